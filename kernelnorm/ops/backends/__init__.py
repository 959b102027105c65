"""Backends: implementations of a KNConv's primitives, and the one function that selects them.

*Maps* have one value for each pixel or window, shape :math:`(N, 1, *)`; *vectors* have one value
for each filter, shape :math:`(K,)`. Both have the :func:`compute_dtype` of the input.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernelnorm.ops.settings import Settings

__all__ = ["Backend", "Statistics", "backend_for", "compute_dtype"]


class Statistics(NamedTuple):
    r"""The statistics of all windows.

    Shape:
        - mu, rstd: maps; :math:`\mu` and :math:`(\text{var} + \epsilon)^{-1/2}`
        - offset, means: :math:`(N, G, *)` for ``G`` groups, or ``None`` if they were not asked for;
          :math:`\mu` minus the plain mean of the group's channels in the window, and that mean
    """

    mu: Tensor
    rstd: Tensor
    offset: Tensor | None = None
    means: Tensor | None = None


class Backend(Protocol):
    """The primitives of a KNConv.

    A primitive that *writes into* an argument saves memory: it returns that tensor if its layout
    allows it, else a new one. ``eager`` always returns a new one; the tests expect the saving of
    all others. Callers use the returned tensor, and not the argument.
    """

    name: str
    centres_filters: bool
    """True if centring the filters takes less time than subtracting a term from the output."""

    def supports(self, x: Tensor) -> bool:
        """True if the primitives work for the device, dtype and number of elements of ``x``.

        Compilers ask with tensors without memory, and then call :meth:`convolution` with them.
        """

    def window_statistics(
        self, x: Tensor, keys: Tensor | None, settings: Settings, with_means: bool
    ) -> Statistics:
        """Mean and inverse standard deviation of each window."""

    def convolution(self, x: Tensor, filters: Tensor, settings: Settings) -> Tensor:
        """The convolution, in memory that the caller may overwrite."""

    def epilogue(
        self,
        z: Tensor,
        terms: list[tuple[Tensor, Tensor]],
        rstd: Tensor,
        bias: Tensor | None,
        slope: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and without an activation the numerator.

        Writes into ``z``: the numerator or, with an activation, the output. ``terms`` is empty only
        if :attr:`centres_filters`.
        """

    def epilogue_backward(
        self,
        grad: Tensor,
        kept: Tensor,
        statistics: Statistics,
        filter_sums: Tensor,
        bias: Tensor | None,
        slope: float | None,
        factors: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the convolution's result, of the statistics and of the bias, and minus the
        gradient of the filter sums.
        """

    def convolution_backward(
        self,
        grad: Tensor,
        x: Tensor,
        filters: Tensor,
        mu: Tensor,
        grad_sums: Tensor,
        settings: Settings,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the input and of the centred filters.

        Private training also calls it directly, with ``mu`` of zeros and a group for each sample.
        """

    def statistics_backward(
        self, grad: Tensor, x: Tensor, pair: Tensor, keys: Tensor | None, settings: Settings
    ) -> Tensor:
        """Add the gradient through the statistics to ``grad``. Writes into ``grad``."""


def backend_for(x: Tensor) -> Backend:
    """Select the backend for inputs like ``x``."""
    from kernelnorm.ops.backends import cpu, eager

    if x.is_cuda:
        from kernelnorm.ops.backends import triton  # Triton takes a moment to load

        return triton if triton.supports(x) else eager
    return cpu if cpu.supports(x) else eager


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over the channels of ``x``: float32 at least."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
