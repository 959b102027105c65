"""``kernelnorm compare``: train several normalisations; write a table and a picture."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.options import (
    add_norms_argument,
    add_run_arguments,
    check_agc,
    command_parser,
    configure_run,
    echo,
    explain_lr,
    where,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Train the missing runs of each norm and batch size, then write a table and a picture.\n"
        "Run the same command again to resume.",
        "kernelnorm compare digits-vgg8",
        "kernelnorm compare cifar10-vgg8 --norms batch,kernel --batch-sizes 2,32,256 --epochs 5",
    )
    add_norms_argument(parser)
    sizes_help = "comma-separated"
    parser.add_argument("--batch-sizes", type=values.integers, default=[2, 32], help=sizes_help)
    add_run_arguments(parser)
    parser.add_argument(
        "--out",
        type=values.folder,
        metavar="DIR",
        help="folder of the runs, the table and the picture (default: runs/CASE)",
    )
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.compare import compare
    from kernelnorm.experiments.launch import Launch, leave
    from kernelnorm.experiments.style import LABELS

    configs = [
        configure_run(arguments, norm, batch_size)
        for batch_size in dict.fromkeys(arguments.batch_sizes)
        for norm in sorted({*arguments.norms}, key=[*LABELS].index)
    ]
    check_agc(arguments, configs)
    explain_lr(arguments, configs)
    out = arguments.out or Path("runs") / configs[0].case
    compare(configs, out, Launch(**where(arguments)))
    echo(f"Next: kernelnorm report {shlex.quote(str(out))}")
    leave()
