"""The command line.

The experiments are imported where they are used, so that ``--help`` and errors in the
arguments need no time for them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kernelnorm import __version__
from kernelnorm.cli import (
    bench,
    compare,
    evaluate,
    evaluate_published,
    predict,
    report,
    reproduce,
    sweep,
    train,
)
from kernelnorm.cli.options import Help
from kernelnorm.cli.values import unknown

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


class _File(Protocol):
    """The functions of a command's file."""

    def make_parser(self) -> ArgumentParser: ...

    def run(self, arguments: Namespace) -> None: ...


class Command(NamedTuple):
    """One of ``kernelnorm``'s commands; ``resumes``: a stopped one resumes if run again."""

    file: _File
    summary: str
    resumes: bool = False


COMMANDS = {
    "train": Command(train, "train a network, or resume its training", resumes=True),
    "compare": Command(
        compare, "train several normalisations; write a table and a picture", resumes=True
    ),
    "sweep": Command(sweep, "train a grid of runs, several in parallel", resumes=True),
    "reproduce": Command(
        reproduce, "repeat the paper's experiments: tuning, repetitions, report", resumes=True
    ),
    "report": Command(report, "write tables and figures from folders of runs"),
    "evaluate": Command(evaluate, "test accuracy of a trained network"),
    "evaluate-published": Command(
        evaluate_published, "accuracy on ImageNet of weights that the paper's authors published"
    ),
    "predict": Command(predict, "predict the classes of image files"),
    "bench": Command(bench, "measure time and memory of normalisations"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with ``argv`` in place of the process's own arguments.

    Wrong arguments exit with code 2, other problems that the user can solve with code 1. Each
    prints one line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of classes and files, on any console
            stream.reconfigure(errors="backslashreplace")
    try:
        _main(argv)
    except KeyboardInterrupt:  # also while modules are imported
        name = next(iter(sys.argv[1:] if argv is None else argv), "")
        more = " Run the same command to resume." * (name in COMMANDS and COMMANDS[name].resumes)
        print(f"Stopped.{more}", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        sys.exit(
            f"kernelnorm: {error.name} is missing. Install it with: "
            "pip install 'kernelnorm[experiments]' (in a checkout: pip install '.[experiments]')"
        )


def _main(argv: Sequence[str] | None) -> None:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        _answer(name)
        return
    command = COMMANDS[name]
    parser = command.file.make_parser()
    parser.prog = f"kernelnorm {name}"
    arguments = parser.parse_args(rest)

    from kernelnorm.experiments.data import DataError
    from kernelnorm.experiments.heap import keep_freed_memory
    from kernelnorm.experiments.runs import RunError

    keep_freed_memory()
    try:
        command.file.run(arguments)
    except (DataError, RunError) as error:
        sys.exit(f"kernelnorm: {error}")


def _answer(argument: str) -> None:
    """Print the help or the version, or report an unknown command."""
    from kernelnorm.cli.parser import Parser

    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}} {command.summary}" for name, command in COMMANDS.items()]
    parser = Parser(
        prog="kernelnorm",
        usage="kernelnorm COMMAND [options]",
        description="Train kernel normalized networks, and compare them with other normalisations.",
        epilog="\n".join(
            ["commands:", *lines, "", "options of a command: kernelnorm COMMAND --help"]
        ),
        version=__version__,
        formatter_class=Help,
    )
    if not argument.startswith("-"):
        parser.error(unknown("command", argument, COMMANDS))
    parser.parse_args([argument])
