"""Sums over sliding windows of one-channel maps, and their transpose.

A window's statistics are sums over its pixels, so they cost a box filter over maps that have one
channel, whatever the number of channels of the input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """How a window slides: one integer for each spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def pointwise(self) -> bool:
        """Whether each window is one pixel and each pixel is one window."""
        return {*self.kernel_size, *self.stride} == {1} and set(self.padding) == {0}

    def reach(self, i: int) -> int:
        """The pixels from a window's first to its last, both counted, along dimension ``i``."""
        return self.dilation[i] * (self.kernel_size[i] - 1) + 1

    def positions(self, size: int, i: int) -> int:
        """The number of windows along dimension ``i`` of an input with ``size`` pixels there."""
        return (size + 2 * self.padding[i] - self.reach(i)) // self.stride[i] + 1


def _taps(geometry: Geometry, i: int, positions: int) -> list[tuple[Any, ...]]:
    """For each pixel of the window, the index of the pixels that all positions see through it."""
    step = geometry.stride[i]
    span = step * (positions - 1) + 1
    offsets = range(0, geometry.reach(i), geometry.dilation[i])
    after = (slice(None),) * (len(geometry.stride) - 1 - i)
    return [(..., slice(o, o + span, step), *after) for o in offsets]


def box_sum(maps: Tensor, geometry: Geometry) -> Tensor:
    """The sum of the maps over each window; padded pixels are zero.

    Shape:
        - Input: :math:`(*, L_1, ..., L_d)`
        - Output: :math:`(*, P_1, ..., P_d)`
    """
    if geometry.pointwise:
        return maps
    d = len(geometry.stride)
    maps = F.pad(maps, [p for size in reversed(geometry.padding) for p in (size, size)])
    for i in range(d):
        positions = geometry.positions(maps.shape[i - d] - 2 * geometry.padding[i], i)
        first, *rest = _taps(geometry, i, positions)
        total = maps[first]
        for tap in rest:
            total = total + maps[tap]
        maps = total
    return maps


def box_sum_transpose(maps: Tensor, geometry: Geometry, sizes: tuple[int, ...]) -> Tensor:
    """The transpose of :func:`box_sum`: each pixel gathers from the windows that contain it.

    Shape:
        - Input: :math:`(*, P_1, ..., P_d)`
        - Output: :math:`(*, L_1, ..., L_d)` with ``sizes`` for :math:`L_1, ..., L_d`
    """
    if geometry.pointwise:
        return maps
    d = len(geometry.stride)
    for i in reversed(range(d)):
        shape = list(maps.shape)
        shape[i - d] = sizes[i] + 2 * geometry.padding[i]
        spread = maps.new_zeros(shape)
        for tap in _taps(geometry, i, maps.shape[i - d]):
            spread[tap] += maps
        maps = spread.narrow(i - d, geometry.padding[i], sizes[i])
    return maps
