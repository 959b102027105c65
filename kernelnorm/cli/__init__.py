"""The command line. Each command has a file, with the functions ``make_parser`` and ``run``.

A command imports its dependencies when it runs, so its help, and mistakes in its arguments, do not
wait for PyTorch. This file imports little, so that :func:`main` handles Ctrl-C from the start.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from kernelnorm import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Command(NamedTuple):
    """A command; ``resumes``: a stopped command resumes if the user runs it again."""

    summary: str
    resumes: bool = False


COMMANDS = {
    "train": Command("train a network, or resume its training", resumes=True),
    "compare": Command("train several normalisations; write a table and a picture", resumes=True),
    "sweep": Command("train a grid of runs, several in parallel", resumes=True),
    "reproduce": Command(
        "repeat the paper's experiments: tuning, repetitions, report", resumes=True
    ),
    "report": Command("write tables and figures from folders of runs"),
    "evaluate": Command("test accuracy of a trained network"),
    "evaluate-published": Command(
        "accuracy on ImageNet of weights that the paper's authors published"
    ),
    "predict": Command("predict the classes of image files"),
    "bench": Command("measure time and memory of normalisations"),
    "info": Command("show versions, devices and folders, for a bug report"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with ``argv`` in place of the process's own arguments.

    Wrong arguments exit with code 2, other problems that the user can solve with code 1, and Ctrl-C
    with code 130. Each prints a short message.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # prints any name on any console
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if argv is None else argv
    try:
        _main(*arguments or ["--help"])
        if sys.stdout is not None:  # it was closed by the caller
            sys.stdout.flush()
    except BrokenPipeError:  # the program that reads the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(f"kernelnorm: {error.strerror}, so the output cannot be written")
    except KeyboardInterrupt:
        print(_stopped(*arguments), file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        sys.exit(
            f"kernelnorm: {error.name} is missing. Install it with: "
            "pip install 'kernelnorm[experiments]' (in a checkout: pip install '.[experiments]')"
        )


def _main(name: str, *rest: str) -> None:
    if name not in COMMANDS:
        _answer(name, *rest)
        return
    with _ctrl_c_ends_the_process(_stopped(name)):
        command = _file_of(name)
        if name == "info" and not rest:  # works without a parser, if jsonargparse is missing
            command.run()
            return
        arguments = parser_of(name).parse_args(rest)

        import torch  # noqa: F401, imported here since it imports NumPy

        from kernelnorm.experiments.errors import DataError, RunError
        from kernelnorm.experiments.heap import keep_freed_memory

    keep_freed_memory()
    try:
        command.run(arguments)
    except (DataError, RunError) as error:
        sys.exit(f"kernelnorm: {error}")


def _stopped(name: str = "", *_: str) -> str:
    """Return the message of a stopped command."""
    resumes = name in COMMANDS and COMMANDS[name].resumes
    return f"Stopped.{' Run the same command to resume.' * resumes}"


@contextmanager
def _ctrl_c_ends_the_process(message: str) -> Iterator[None]:
    """Print the message and exit upon Ctrl-C while modules are imported.

    A KeyboardInterrupt is not enough: PyTorch catches it while it imports NumPy, and goes on with
    a partly imported NumPy.
    """

    def stop(*_: object) -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(130)

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # there is another handler, or a shell's background job ignores Ctrl-C
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def parser_of(name: str) -> ArgumentParser:
    """Return the parser of a command's arguments."""
    parser: ArgumentParser = _file_of(name).make_parser()
    parser.prog = f"kernelnorm {name}"
    return parser


def _file_of(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def _answer(*arguments: str) -> None:
    """Print the help, the version or a completion script, or report an unknown command."""
    from kernelnorm.cli.options import Help
    from kernelnorm.cli.parser import Parser
    from kernelnorm.cli.values import choice, unknown

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
    if not arguments[0].startswith("-"):
        parser.error(unknown("command", arguments[0], COMMANDS))
    help = "print a script for completion in bash, zsh or tcsh, see docs/training.md"
    check = choice("shell", ["bash", "zsh", "tcsh"])
    parser.add_argument("--print-completion", type=check, metavar="SHELL", help=help)
    if shell := parser.parse_args(arguments).print_completion:
        if find_spec("shtab") is None:
            sys.exit("kernelnorm: --print-completion needs: pip install shtab")
        from kernelnorm.cli.completion import script

        parsers = {name: parser_of(name) for name in COMMANDS}
        print(script(shell, parsers, {name: c.summary for name, c in COMMANDS.items()}))
