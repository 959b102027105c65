"""``kernelnorm reproduce``: the paper's experiments: tuning, repetitions, report."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.execution import add_sweep_arguments, execute_plan
from kernelnorm.cli.options import (
    add_case_argument,
    add_norms_argument,
    add_place_arguments,
    command_parser,
)
from kernelnorm.cli.report import write_report

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Repeat the paper's experiments: search the best learning rate of each norm and batch\n"
        "size, train three times with it, and write the report.\n"
        "Run the same command again to resume.",
        "kernelnorm reproduce cifar10-vgg8 --scale small",
        "kernelnorm reproduce cifar10-vgg8 --scale paper --data-dir ~/data --dry-run",
        "kernelnorm reproduce imagewoof-resnet18 --scale paper --batch-sizes 64,128,256 --jobs 2",
    )
    add = parser.add_argument
    add_case_argument(parser, "cifar10-vgg8")
    scale_help = (
        "paper: the paper's epochs, images and batch sizes; small: fewer of each, for a CPU"
    )
    add("--scale", choices=["small", "paper"], default="small", help=scale_help)
    add_norms_argument(parser)
    add("--batch-sizes", type=values.integers, help="comma-separated (default: the scale's)")
    seeds_help = "random seeds of the repetitions, comma-separated; the search uses seed 0"
    add("--seeds", type=values.seeds, default=[1, 2, 3], help=seeds_help)
    rates_help = "try all learning rates of the paper, not only neighbours of the best one"
    add("--all-rates", action="store_true", help=rates_help)
    add_place_arguments(parser)
    out_help = "folder of the runs and the report (default: runs/reproduce/CASE-SCALE)"
    add("--out", type=values.folder, metavar="DIR", help=out_help)
    add_sweep_arguments(parser)
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.errors import RunError
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
    except BaseException:
        with suppress(RunError):  # the first problem is the one to know
            _report(out, arguments)
        raise
    _report(out, arguments)


def _report(out: Path, arguments: Namespace) -> None:
    if not arguments.dry_run and any(out.glob("*/metrics.jsonl")):
        write_report(out)
