"""Sums over sliding windows of one-channel maps, and their transpose.

A window's statistics are sums over its pixels, so they cost a box filter over maps with one
channel, whatever the number of channels of the input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernelnorm.ops import observers


class Geometry(NamedTuple):
    """How a window slides: one integer for each spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def pointwise(self) -> bool:
        """True if each window is one pixel and each pixel is one window."""
        return {*self.kernel_size, *self.stride} == {1} and set(self.padding) == {0}

    def reach(self, i: int) -> int:
        """The pixels that a window spans along dimension ``i``."""
        return self.dilation[i] * (self.kernel_size[i] - 1) + 1

    def positions(self, i: int, size: int) -> int:
        """The number of windows along dimension ``i`` of an input of ``size`` pixels."""
        return (size + 2 * self.padding[i] - self.reach(i)) // self.stride[i] + 1


def box_sum(maps: Tensor, geometry: Geometry, factor: float = 1.0, bias: float = 0.0) -> Tensor:
    r"""The sum of a map over each window, :math:`\text{factor} \sum x + \text{bias}`.

    Padded pixels are zero.

    Shape:
        - Input: :math:`(N, M, L_1, ..., L_d)`, each of the ``M`` maps on its own
        - Output: :math:`(N, M, P_1, ..., P_d)`
    """
    if geometry.pointwise:
        maps = maps if factor == 1 else maps * factor
        return maps if bias == 0 else maps + bias
    _, stride, padding, dilation = geometry
    filters, shift, count = _constant(maps, geometry, factor), None, observers.sizes(maps)[1]
    if bias != 0:
        shift = torch.full((count,), bias, dtype=maps.dtype, device=maps.device)
    zeros = [0] * len(stride)
    return torch.convolution(maps, filters, shift, stride, padding, dilation, False, zeros, count)


def box_sum_transpose(maps: Tensor, geometry: Geometry, sizes: tuple[int, ...]) -> Tensor:
    """The transpose of :func:`box_sum`: each pixel sums over the windows that contain it.

    Shape:
        - Input: :math:`(N, M, P_1, ..., P_d)`
        - Output: :math:`(N, M, L_1, ..., L_d)` with ``sizes`` for :math:`L_1, ..., L_d`
    """
    if geometry.pointwise:
        return maps
    _, stride, padding, dilation = geometry
    remainder = [
        (size + 2 * p - geometry.reach(i)) % stride[i]
        for i, (size, p) in enumerate(zip(sizes, padding, strict=True))
    ]
    ones = _constant(maps, geometry, 1.0)
    return torch.convolution(
        maps, ones, None, stride, padding, dilation, True, remainder, observers.sizes(maps)[1]
    )


def _constant(maps: Tensor, geometry: Geometry, value: float) -> Tensor:
    """A depthwise filter of the window's size with one value."""
    shape = observers.sizes(maps)[1], 1, *geometry.kernel_size
    return torch.full(shape, value, dtype=maps.dtype, device=maps.device)
