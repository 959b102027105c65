"""The command line: arguments to calls.

The experiments are imported where they are used, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kernelnorm import __version__
from kernelnorm.cli import bench, compare, evaluate, predict, report, reproduce, sweep, train
from kernelnorm.cli.options import Help

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


class _File(Protocol):
    """What the file of a command has."""

    def make_parser(self) -> ArgumentParser: ...

    def run(self, arguments: Namespace) -> None: ...


class Command(NamedTuple):
    """One of ``kernelnorm``'s commands; ``goes_on``: it can be stopped and given again."""

    file: _File
    summary: str
    goes_on: bool = False


COMMANDS = {
    "train": Command(train, "train a network, or go on with its training", goes_on=True),
    "compare": Command(
        compare, "train several normalisations: a table and a picture", goes_on=True
    ),
    "sweep": Command(sweep, "train a grid of runs, some at a time", goes_on=True),
    "reproduce": Command(
        reproduce, "the paper's experiments: tuning, repetitions, report", goes_on=True
    ),
    "report": Command(report, "tables and figures from folders of runs"),
    "evaluate": Command(evaluate, "accuracy of a trained network on its test images"),
    "predict": Command(predict, "classes of image files"),
    "bench": Command(bench, "time and memory of normalisations, side by side"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with ``argv`` in place of the process's own arguments.

    A mistake in the arguments exits with 2, a problem that the user can solve with 1 and one line.
    """
    try:
        _main(argv)
    except ModuleNotFoundError as error:
        sys.exit(f"kernelnorm: {error.name} is missing: pip install 'kernelnorm[experiments]'")


def _main(argv: Sequence[str] | None) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="kernelnorm",
        description="Train kernel normalized networks, and compare them with other normalisations.",
        version=__version__,
        formatter_class=Help,
    )
    commands = parser.add_subcommands(required=False, dest="command")
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, command.file.make_parser(), help=command.summary)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return

    from kernelnorm.experiments.data import DataError
    from kernelnorm.experiments.heap import keep_freed_memory
    from kernelnorm.experiments.runs import RunError

    keep_freed_memory()
    command = COMMANDS[arguments.command]
    try:
        command.file.run(arguments[arguments.command])
    except (DataError, RunError) as error:
        sys.exit(f"kernelnorm: {error}")
    except KeyboardInterrupt:
        more = "; the same command goes on from the last checkpoint" * command.goes_on
        print(f"kernelnorm: stopped{more}", file=sys.stderr)
        sys.exit(130)
