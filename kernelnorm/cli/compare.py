"""``kernelnorm compare``: train several normalisations: a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli.options import (
    add_norms_argument,
    add_run_arguments,
    command_parser,
    configure_run,
    numbers,
    where,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Train what is missing of every norm and batch size, then write a table and a picture.",
        "kernelnorm compare digits-vgg8",
        "kernelnorm compare cifar10-vgg8 --norms batch,kernel --batch-sizes 2,32,256 --epochs 5",
    )
    add_norms_argument(parser)
    parser.add_argument("--batch-sizes", type=numbers, default=[2, 32], help="with commas")
    add_run_arguments(parser)
    parser.add_argument("--out", type=Path | None, help="the folder; without it runs/CASE")
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.compare import compare
    from kernelnorm.experiments.launch import Launch, leave

    configs = [
        configure_run(arguments, norm, batch_size)
        for batch_size in arguments.batch_sizes
        for norm in arguments.norms
    ]
    out = arguments.out or Path("runs") / configs[0].case
    compare(configs, out, Launch(**where(arguments)))
    leave()
