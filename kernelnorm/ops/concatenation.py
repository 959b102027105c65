"""Concatenations that remember their parts, so that a dense block keeps each channel once.

The layers of a dense block each see all channels before them. Keeping every concatenation for the
backward pass would take memory that grows with the square of the depth. The parts are kept anyway,
by the layers that made them; a KNConv that is given a concatenation keeps these, and concatenates
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
"""The parts of each concatenation. As an attribute they would be saved and loaded with it."""


def concatenate(x: Tensor, y: Tensor) -> Tensor:
    """``torch.cat([x, y], 1)``, remembering the parts of ``x`` and ``y`` where autograd is on."""
    result = torch.cat([x, y], 1)
    if torch.compiler.is_compiling() or not isinstance(result, Tensor):  # a proxy of torch.fx
        return result
    if result.requires_grad:
        tensors = (*parts_of(x), *parts_of(y))
        if not any(part.is_inference() for part in tensors):  # which no backward may keep
            _PARTS[result] = _Parts(tensors, _versions(result, tensors))
    return result


def parts_of(x: Tensor) -> tuple[Tensor, ...]:
    """The tensors whose concatenation ``x`` is, or ``x`` itself.

    After an in-place change of the concatenation or of a part, ``x`` is not that any more.
    """
    parts: _Parts | None = _PARTS.get(x)
    if parts is None or parts.versions != _versions(x, parts.tensors):
        return (x,)
    return parts.tensors


def _versions(x: Tensor, parts: tuple[Tensor, ...]) -> tuple[int, ...]:
    return observers.version(x), *map(observers.version, parts)
