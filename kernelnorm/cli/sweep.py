"""``kernelnorm sweep``: train a grid of runs, several in parallel."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.execution import add_sweep_arguments, execute_plan
from kernelnorm.cli.options import (
    add_norms_argument,
    add_place_arguments,
    add_recipe_arguments,
    check_agc,
    choices,
    command_parser,
    recipe_of,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from kernelnorm.experiments.config import RunConfig


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Train the missing runs of a grid, several in parallel.\n"
        "Run the same command again to resume.",
        "kernelnorm sweep",
        "kernelnorm sweep cifar10-vgg8 --norms batch,kernel --batch-sizes 2,32 --lrs 0.01,0.025",
        "kernelnorm sweep --config examples/sweeps/dropout.yaml --dry-run",
    )
    add = parser.add_argument
    add_norms_argument(parser)
    add("--batch-sizes", type=values.integers, default=[8, 32], help="comma-separated")
    rates_help = "comma-separated learning rates; auto: the paper's Table 4"
    add("--lrs", type=values.rates, default="auto", help=rates_help)
    add("--seeds", type=values.seeds, default=[0], help="comma-separated random seeds")
    rules_help = 'list of rules for kernel networks, such as [{"dropout_p": 0.0}, {}]'
    add("--rules", type=values.mappings, default=[{}], metavar="JSON", help=rules_help)
    add_recipe_arguments(parser)
    add_place_arguments(parser)
    add("--out", type=values.folder, metavar="DIR", help="folder of the runs (default: runs/CASE)")
    add_sweep_arguments(parser)
    return parser


def make_runs(arguments: Namespace) -> list[RunConfig]:
    """Return the configurations of the grid."""
    from kernelnorm.experiments.sweep import make_grid

    return make_grid(
        recipe_of(arguments),
        norms=arguments.norms,
        batch_sizes=arguments.batch_sizes,
        lrs=arguments.lrs,
        seeds=arguments.seeds,
        rules=arguments.rules,
        **choices(arguments),
    )


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.sweep import Grid

    grid = make_runs(arguments)
    check_agc(arguments, grid)
    out = arguments.out or Path("runs") / grid[0].case
    execute_plan(Grid(grid), out, arguments)
    if not arguments.dry_run:
        print(f"Next: kernelnorm report {shlex.quote(str(out))}")
