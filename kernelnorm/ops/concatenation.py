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

from kernelnorm.ops import observers

_ATTRIBUTE = "concatenation_parts"


class _Parts(NamedTuple):
    tensors: tuple[Tensor, ...]
    version: int  # of the concatenation; in-place changes would make it differ from its parts


def concatenate(x: Tensor, y: Tensor) -> Tensor:
    """``torch.cat([x, y], 1)``, remembering the parts of ``x`` and ``y`` where autograd is on."""
    result = torch.cat([x, y], 1)
    if result.requires_grad and not torch.compiler.is_compiling():
        parts = _Parts((*parts_of(x), *parts_of(y)), observers.version(result))
        setattr(result, _ATTRIBUTE, parts)
    return result


def parts_of(x: Tensor) -> tuple[Tensor, ...]:
    """The tensors whose concatenation ``x`` is, or ``x`` itself."""
    parts: _Parts | None = getattr(x, _ATTRIBUTE, None)
    if parts is None or parts.version != observers.version(x):
        return (x,)
    return parts.tensors
