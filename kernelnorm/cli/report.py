"""``kernelnorm report``: tables and figures from folders of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli.options import command_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Write the paper's tables and figures, from the folders of runs and nothing else.",
        "kernelnorm report runs/digits-vgg8",
        "kernelnorm report runs/reproduce/cifar10-vgg8-small --out docs/results/cifar10-vgg8",
    )
    parser.add_argument("runs", type=Path, metavar="DIR", help="the folder that runs are in")
    parser.add_argument("--out", type=Path | None, help="the folder; without it DIR/report")
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    write_report(arguments.runs, arguments.out)


def write_report(runs: Path, out: Path | None = None) -> None:
    """Write the report of a folder of runs, and tell where it is."""
    from kernelnorm.experiments.report import report

    print(f"Report: {report(runs, out)}")
