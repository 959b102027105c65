"""The efficient algorithm. This file is its one seam: which row primitives run where."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from kernelnorm.ops import rows_compiled, rows_torch


def rows_for(x: Tensor) -> ModuleType:
    """The module whose row primitives are used for inputs like ``x``."""
    if x.is_cuda:
        from kernelnorm.ops import rows_triton  # Triton takes a moment to load

        return rows_triton if rows_triton.supports(x) else rows_torch
    return rows_compiled if rows_compiled.supports(x) else rows_torch


def differentiable_rows() -> ModuleType:
    """The module whose row primitives autograd can differentiate."""
    return rows_torch
