"""The efficient algorithm. This file is its one seam: which primitives of a layer run where."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from kernelnorm.ops import rows_compiled, rows_torch, statistics


class Primitives(NamedTuple):
    """What a layer does beside its convolution.

    Each is a function of :mod:`kernelnorm.ops.statistics` or of :mod:`kernelnorm.ops.rows_torch`.
    """

    window_statistics: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    epilogue: Callable[..., tuple[Tensor, Tensor | None]]
    output_gradient: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    through_statistics: Callable[..., tuple[Tensor | None, Tensor | None]]


def primitives_of(rows: ModuleType) -> Primitives:
    """Those that are made of a module's row primitives."""
    return Primitives(
        partial(statistics.window_statistics, rows),
        rows.epilogue,
        rows.output_gradient,
        partial(statistics.through_statistics, rows),
    )


DIFFERENTIABLE = primitives_of(rows_torch)
"""The primitives that autograd can differentiate."""

_COMPILED = Primitives(
    rows_compiled.window_statistics,
    rows_compiled.epilogue,
    rows_compiled.output_gradient,
    rows_compiled.through_statistics,
)


def primitives_for(x: Tensor) -> Primitives:
    """The primitives that are used for inputs like ``x``."""
    if x.is_cuda:
        from kernelnorm.ops import rows_triton  # Triton takes a moment to load

        return primitives_of(rows_triton) if rows_triton.supports(x) else DIFFERENTIABLE
    return _COMPILED if rows_compiled.supports(x) else DIFFERENTIABLE
