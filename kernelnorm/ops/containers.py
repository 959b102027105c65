"""Nested lists, tuples, mappings and dataclasses: finds their tensors, or copies these."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["tensors_in", "with_tensors_copied"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, in order; other objects are skipped."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name, None))


def with_tensors_copied(value: Any) -> Any:
    """Return nested containers with copies of the tensors.

    Lists, tuples, mappings and dataclasses keep their class. A mapping that cannot be copied
    becomes a dict. Other objects, also other classes of lists and tuples, are the same ones.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        items = {name: with_tensors_copied(item) for name, item in value.items()}
        return _with_items(value, items)
    if type(value) in (list, tuple):
        return type(value)(map(with_tensors_copied, value))
    if isinstance(value, tuple) and hasattr(value, "_make"):  # a named tuple
        return value._make(map(with_tensors_copied, value))
    if is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for name in [field.name for field in fields(value) if hasattr(value, field.name)]:
            # also of a frozen dataclass
            object.__setattr__(new, name, with_tensors_copied(getattr(value, name)))
        return new
    return value


def _with_items(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(value) is dict or not isinstance(value, MutableMapping):
        return items
    try:
        new = copy.copy(value)
        new.update(items)
    except Exception:  # of a class of the user
        return items
    return new
