"""``kernelnorm reproduce``: the paper's experiments: tuning, repetitions, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kernelnorm.cli.execution import add_sweep_arguments, execute_plan
from kernelnorm.cli.options import (
    add_case_argument,
    add_norms_argument,
    add_place_arguments,
    command_parser,
    numbers,
)
from kernelnorm.cli.report import write_report

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Make the paper's experiments anew: the best learning rate of each norm and batch size,\n"
        "then three repetitions with it, then the report. The same command goes on.",
        "kernelnorm reproduce cifar10-vgg8 --scale small",
        "kernelnorm reproduce cifar10-vgg8 --scale paper --data-dir ~/data --dry-run",
        "kernelnorm reproduce imagewoof-resnet18 --scale paper --batch-sizes 64,128,256 --jobs 2",
    )
    add = parser.add_argument
    add_case_argument(parser, "without it cifar10-vgg8")
    scale_help = "paper: its epochs, images and batch sizes; small: less of each, for a CPU"
    add("--scale", type=Literal["small", "paper"], default="small", help=scale_help)
    add_norms_argument(parser)
    add("--batch-sizes", type=numbers, help="with commas; without it the scale's")
    add("--seeds", type=numbers, default=[1, 2, 3], help="of the repetitions; tuning has seed 0")
    rates_help = "try all of the paper's learning rates, also those that worse neighbours rule out"
    add("--all-rates", action="store_true", help=rates_help)
    add_place_arguments(parser)
    add("--out", type=Path | None, help="the folder; without it runs/reproduce/CASE-SCALE")
    add_sweep_arguments(parser)
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.sweep import reproduction

    case = arguments.get("case", "cifar10-vgg8")
    plan = reproduction(
        case,
        arguments.scale,
        norms=arguments.norms,
        batch_sizes=arguments.batch_sizes,
        seeds=arguments.seeds,
        every_rate=arguments.all_rates,
    )
    out = arguments.out or Path("runs/reproduce") / f"{case}-{arguments.scale}"
    try:
        execute_plan(plan, out, arguments)
    finally:
        if not arguments.dry_run and any(out.glob("*/metrics.jsonl")):
            write_report(out)
