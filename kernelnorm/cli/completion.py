"""Completion of commands, options and names in a shell, by the package shtab."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping

import shtab

from kernelnorm.cli import values
from kernelnorm.cli.names import CASES, MODELS

_NAMES: dict[object, tuple[str, ...]] = {values.case: CASES, values.model: MODELS}
_FILES: dict[object, object] = {
    values.folder: shtab.DIRECTORY,
    values.path: shtab.FILE,
    values.dataset: shtab.DIRECTORY,
}


def script(shell: str, commands: Mapping[str, ArgumentParser], summaries: Mapping[str, str]) -> str:
    """Return the script that completes the command line ``kernelnorm``.

    Args:
        shell: one of the shells that shtab knows, such as ``"bash"``.
        commands: the parser of each command.
        summaries: what each command does.
    """
    parser = ArgumentParser(prog="kernelnorm")
    subparsers = parser.add_subparsers()
    for name, command in commands.items():
        for action in command._actions:
            check = getattr(action.type, "__wrapped__", None)
            action.choices = action.choices or _NAMES.get(check)
            if check in _FILES:
                action.complete = _FILES[check]  # type: ignore[attr-defined]
        subparsers.add_parser(name, help=summaries[name], parents=[command], add_help=False)
    return str(shtab.complete(parser, shell))
