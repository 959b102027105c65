"""The argument parser: jsonargparse's, with errors of one line."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from kernelnorm.cli import config, values

_PLAINER = {
    r"argument (\S+): expected one argument": r"\1 needs a value",
    r"argument (\S+): ignored explicit argument (.*)": r"\1 takes no value, got \2",
    r"the following arguments are required: (.*)": r"missing argument: \1",
    r'.*Key "(\w+)" is required .*': r"missing argument: \1",
    r"[Uu]nrecognized arguments: (\S+).*": r"unexpected argument '\1'",
}
"""Patterns of argparse's and jsonargparse's messages, and the messages that replace them."""


class Parser(ArgumentParser):
    """Prints a mistake in one line, then the command that explains the options."""

    source = ""  # prefix of messages: the file that has the value
    given: frozenset[str] = frozenset()  # the options on the command line

    def __init__(self, **options: Any) -> None:
        super().__init__(print_config=None, allow_abbrev=False, **options)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an option or a positional argument, whose ``type`` is a check of ``values``."""
        if "choices" in kwargs:
            kwargs["type"] = values.choice(args[0].strip("-"), kwargs["choices"])
        if "type" in kwargs:
            kwargs["type"] = self.checked(args[0], kwargs["type"])
        return super().add_argument(*args, **kwargs)

    def checked(self, option: str, check: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a check that ends the process with a message if the value is not allowed."""

        @functools.wraps(check)
        def checked(value: Any) -> Any:
            if value == argparse.SUPPRESS:  # a default value, which argparse may check, too
                return value
            try:
                return check(value)
            except ValueError as error:
                self.error(f"{self.source}{option} {error}, got {values.short(value)}")
            except LookupError as error:
                self.error(f"{self.source}{error}")

        return checked

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any
    ) -> Namespace:
        """Parse arguments; unknown options are reported before anything else."""
        args = sys.argv[1:] if args is None else args
        options = [argument.split("=")[0] for argument in takewhile("--".__ne__, args)]
        known = self._option_string_actions
        self.given = frozenset(known[option].dest for option in options if option in known)
        for argument, option in zip(args, options, strict=False):
            if re.match(r"-[^\d.]", option) and option not in known:
                message = _unknown_option(option, known)
                if os.path.lexists(argument):
                    message += f". For the file of this name, write: -- {argument}"
                self.error(message)
        return super().parse_args(args, *others, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and the command that explains the options, then exit with code 2."""
        line = message.partition("\n")[0][:500]
        for pattern, plainer in _PLAINER.items():
            line = re.sub(f"^{pattern}$", plainer, line)
        self.exit(2, f"kernelnorm: {line}\nSee: {self.prog} --help\n")


class ConfigFile(argparse.Action):
    """Sets the options that a YAML file names, except those on the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        path: Any,
        option_string: str | None = None,
    ) -> None:
        """Read the file and check its values."""
        assert isinstance(parser, Parser)
        parser.source = f"--config {path}: "
        try:
            given = config.read(path)
        except ValueError as error:
            parser.error(f"{parser.source}{error}")
        known = {action.dest: action for action in parser._actions}
        del known["help"], known["config"]
        for key, value in given.items():
            action = known.get(key.replace("-", "_"))
            if action is None:
                parser.error(parser.source + _unknown_option(key, known))
            if value is not None:  # "subset:" without a value is the default
                check = action.type or parser.checked(action.option_strings[0], values.boolean)
                checked = check(value)  # type: ignore[operator]
                positional = not action.option_strings and action.dest in namespace
                if action.dest not in parser.given and not positional:
                    setattr(namespace, action.dest, checked)
        parser.source = ""


def _unknown_option(option: str, known: Iterable[str]) -> str:
    """Return the message for an option of the command line, or for a key of a YAML file."""
    dashes = "--" * option.startswith("-")
    close = values.closest(option.lstrip("-"), [name.lstrip("-") for name in known])
    hint = f": did you mean '{dashes}{close}'?" if close else ""
    return f"unknown option {values.short(option)}{hint}"
