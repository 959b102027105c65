"""Errors that a user can solve: the message says what is wrong and what to do next."""

from __future__ import annotations

__all__ = ["BusyError", "DataError", "DivergedError", "RunError", "error_message", "to_install"]


class DataError(Exception):
    """Images are missing, damaged or do not fit."""


class RunError(Exception):
    """A run cannot be made, trained, read or written."""


class BusyError(RunError):
    """Another process trains the run."""


class DivergedError(RunError):
    """The loss or a weight became infinite or not a number."""


def error_message(error: Exception) -> str:
    """Return an error's message, after the class's name if the class is not of this module."""
    if isinstance(error, (DataError, RunError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def to_install(extra: str) -> str:
    """Return the command that installs an extra of this package."""
    return f"pip install 'kernelnorm[{extra}]' (in a checkout: pip install '.[{extra}]')"
