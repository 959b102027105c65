"""``kernelnorm report``: tables and figures from folders of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.options import command_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Write the paper's tables and figures from folders of runs. Nothing is trained.",
        "kernelnorm report runs/digits-vgg8",
        "kernelnorm report runs/reproduce/cifar10-vgg8-small --out docs/results/cifar10-vgg8",
    )
    parser.add_argument("runs", type=values.path, metavar="DIR", help="folder that contains runs")
    out_help = "folder of the report (default: DIR/report)"
    parser.add_argument("--out", type=values.folder, metavar="DIR", help=out_help)
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    write_report(arguments.runs, arguments.out)


def write_report(runs: Path, out: Path | None = None) -> None:
    """Write the report of a folder of runs, and print its path."""
    from kernelnorm.experiments.report import report

    print(f"Report: {report(runs, out)}\nNext:   open it in a browser")
