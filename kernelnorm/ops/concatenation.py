"""Concatenations that remember their parts, so that a dense block keeps each channel once.

The layers of a dense block each see all channels before them. Keeping every concatenation for the
backward pass would take memory that grows with the square of the depth. The layers that made the
parts keep them anyway. So a KNConv whose input is a concatenation keeps the parts, and concatenates
them again in its backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernelnorm.ops import observers


class _Parts(NamedTuple):
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]  # of the concatenation and of its parts


_PARTS = WeakTensorKeyDictionary()
"""The parts of each concatenation. An attribute would be saved and loaded with the tensor."""


def concatenate(x: Tensor, y: Tensor) -> Tensor:
    """``torch.cat([x, y], 1)``; remembers the parts if the result requires a gradient."""
    result = torch.cat([x, y], 1)
    if torch.compiler.is_compiling() or not isinstance(result, Tensor):  # a proxy of torch.fx
        return result
    if result.requires_grad:
        tensors = (*parts_of(x), *parts_of(y))
        if not any(part.is_inference() for part in tensors):  # those are not allowed in a backward
            _PARTS[result] = _Parts(tensors, _versions(result, tensors))
    return result


def parts_of(x: Tensor) -> tuple[Tensor, ...]:
    """The tensors that :func:`concatenate` made ``x`` of; ``x`` itself if it did not.

    Also ``x`` itself if it was detached, or after an in-place change of it or of a part.
    """
    parts: _Parts | None = _PARTS.get(x)
    if parts is None or not x.requires_grad or parts.versions != _versions(x, parts.tensors):
        return (x,)
    return parts.tensors


def _versions(x: Tensor, parts: tuple[Tensor, ...]) -> tuple[int, ...]:
    return observers.version(x), *map(observers.version, parts)
