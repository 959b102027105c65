"""YAML: configuration files, and values of options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_MOST = 2**20  # bytes: a larger file is not a list of options, and YAML is slow


class _Loader(yaml.SafeLoader):
    """Loads ``1e-3`` as a number, as JSON does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    [*"-+.0123456789"],
)


def load(text: str) -> Any:
    """Load YAML.

    Raises:
        ValueError: the text is not YAML; the message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"not valid YAML{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError("not valid YAML") from error


def read(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        ValueError: it cannot be read, or is not a mapping of options to values.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if len(content) > _MOST:
        raise ValueError("larger than 1 MiB, so not a configuration file")
    try:
        loaded = load(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError("not a text file in UTF-8") from error
    if not isinstance(loaded, dict):
        raise ValueError("must have lines such as batch_size: 32")
    return {str(key): value for key, value in loaded.items()}
