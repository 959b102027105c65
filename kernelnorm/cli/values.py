"""Checks of option values, given on the command line or in a YAML file.

Each function takes text, or a value as YAML loads it, and returns the value that the command uses.
Values that are not allowed raise an exception whose message the parser prints:

- ``ValueError``: what is allowed, such as "must be a positive integer". The parser adds the option
  and the value.
- ``LookupError``: the whole message, for an unknown name.

A value that was checked before passes unchanged, because jsonargparse checks values twice.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from kernelnorm.cli.names import CASES, DTYPES, MEMORY_FORMATS, MODELS, MODES, NORMS, PASSES

T = TypeVar("T")

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def short(value: object) -> str:
    """Return a value for a message: one line of at most about 60 characters."""
    try:
        return _REPR.repr(str(value) if isinstance(value, Path) else value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a very large number"


def closest(value: str, known: Iterable[str]) -> str:
    """Return the known name that ``value`` resembles most, or ``""`` if none is close."""
    return next(iter(get_close_matches(value[:60].lower(), known, n=1)), "")


def unknown(kind: str, value: object, known: Iterable[str]) -> str:
    """Return the message for a name that is not among the known ones."""
    names = [*known]
    close = closest(str(value), names)
    choose = f"did you mean '{close}'? Choose" if close else "choose"
    return f"unknown {kind} {short(value)}: {choose} from {', '.join(names)}"


def _integer(value: Any, least: int, most: int, expected: str) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(expected) from None
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(expected)
    if number > most:
        raise ValueError(f"must be at most {most}")
    return number


def positive_int(value: Any) -> int:
    """Check an integer from 1 to 2**31 - 1."""
    return _integer(value, 1, 2**31 - 1, "must be a positive integer")


def seed(value: Any) -> int:
    """Check a random seed; PyTorch takes larger ones modulo 2**32."""
    return _integer(value, 0, 2**32 - 1, "must be an integer from 0 to 2**32 - 1")


def _number(value: Any, expected: str, zero: bool = False) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(expected) from None
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(expected)
    return number


def number(value: Any) -> float:
    """Check a finite number of at least 0."""
    return _number(value, "must be a number of at least 0", zero=True)


def positive(value: Any) -> float:
    """Check a positive number."""
    return _number(value, "must be a positive number")


def fraction(value: Any) -> float:
    """Check a number between 0 and 1."""
    expected = "must be a number between 0 and 1"
    if (number := _number(value, expected)) >= 1:
        raise ValueError(expected)
    return number


def rate(value: Any) -> float | str:
    """Check a learning rate, or ``"auto"``."""
    return "auto" if value == "auto" else _number(value, 'must be "auto" or a positive number')


def several(
    check: Callable[[Any], T], expected: str, *, empty: bool = False
) -> Callable[[Any], list[T]]:
    """Return the check of a list: text with commas, a YAML list, or a single value.

    Args:
        check: the check of one value.
        expected: the message if one value is not allowed.
        empty: allow the empty list.
    """

    def check_all(value: Any) -> list[T]:
        parts = value.split(",") if isinstance(value, str) else value
        parts = parts if isinstance(parts, list) else [parts]
        stripped = [part.strip() if isinstance(part, str) else part for part in parts]
        given = [part for part in stripped if part != ""]
        if not given and not empty:
            raise ValueError(expected)
        try:
            return [check(part) for part in given]
        except ValueError:
            raise ValueError(expected) from None

    return check_all


integers = several(positive_int, "must be positive integers separated by commas")
milestones = several(positive_int, "must be positive integers separated by commas", empty=True)
seeds = several(seed, "must be integers from 0 to 2**32 - 1, separated by commas")


def rates(value: Any) -> list[float] | str:
    """Check learning rates, or ``"auto"``."""
    expected = 'must be "auto" or positive numbers separated by commas'
    if value == "auto":
        return "auto"
    return several(lambda part: _number(part, expected), expected)(value)


def boolean(value: Any) -> bool:
    """Check true or false, also as yes, no, on or off."""
    word = str(value).lower()
    if word not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError("must be true or false")
    return word in ("true", "yes", "on")


def text(value: Any) -> str:
    """Check a text that is not empty."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("must be a text")
    return value


def choice(kind: str, known: Iterable[str]) -> Callable[[Any], str]:
    """Return the check of a name among the known ones, each of which is a ``kind``."""
    names = [*known]

    def check(value: Any) -> str:
        if value not in names:
            raise LookupError(unknown(kind, value, names))
        return str(value)

    return check


case = choice("case", CASES)
model = choice("model", MODELS)
models = several(model, "must be networks separated by commas")
norms = several(choice("norm", NORMS), "must be norms separated by commas")
dtypes = several(choice("dtype", DTYPES), "must be dtypes separated by commas")
passes = several(choice("pass", PASSES), "must be passes separated by commas")
modes = several(choice("mode", MODES), "must be modes separated by commas")
memory_formats = several(
    choice("memory format", MEMORY_FORMATS), "must be memory formats separated by commas"
)


def dataset(value: Any) -> str:
    """Check a dataset's name or folder; expand ``~``."""
    return os.path.expanduser(text(value))


def path(value: Any) -> Path:
    """Check a path; expand ``~``."""
    if not isinstance(value, (Path, str)) or not str(value).strip() or "\0" in str(value):
        raise ValueError("must be a path")
    return Path(os.path.expanduser(value))


def folder(value: Any) -> Path:
    """Check the path of a folder that exists or can be made; expand ``~``."""
    place = path(value)
    there = next((p for p in (place, *place.absolute().parents) if os.path.lexists(p)), place)
    if not os.path.isdir(there):
        raise ValueError("must be a folder" if there == place else f"cannot be in the file {there}")
    return place


def mapping(value: Any) -> dict[str, Any]:
    """Check a JSON object."""
    expected = 'must be a JSON object such as {"small_images": true}'
    loaded = _load(value, expected)
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ValueError(expected)
    return loaded


def mappings(value: Any) -> list[dict[str, Any]]:
    """Check a JSON list of objects."""
    expected = 'must be a JSON list of objects such as [{"dropout_p": 0.0}, {}]'
    loaded = _load(value, expected)
    if not isinstance(loaded, list) or not loaded:
        raise ValueError(expected)
    try:
        return [mapping(item) for item in loaded]
    except ValueError:
        raise ValueError(expected) from None


def _load(value: Any, expected: str) -> Any:
    """Load text as YAML, which includes JSON; return other values unchanged."""
    from kernelnorm.cli.config import load

    try:
        return load(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(expected) from None
