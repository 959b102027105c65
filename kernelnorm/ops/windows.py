"""Sums over sliding windows of one-channel maps, and their transpose.

A window's statistics are sums over its pixels, so they cost a box filter over maps that have one
channel, whatever the number of channels of the input.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelnorm.ops.regions import once


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

    def positions(self, i: int, size: int) -> int:
        """The windows along dimension ``i`` of an input of that size."""
        return (size + 2 * self.padding[i] - self.reach(i)) // self.stride[i] + 1


def box_sum(maps: Tensor, geometry: Geometry) -> Tensor:
    """The sum of the maps over each window; padded pixels are zero.

    Shape:
        - Input: :math:`(*, L_1, ..., L_d)`
        - Output: :math:`(*, P_1, ..., P_d)`
    """
    if geometry.pointwise:
        return maps
    return _sum_taps(_pad(maps, [(size, size) for size in geometry.padding]), geometry)


def box_sum_transpose(maps: Tensor, geometry: Geometry, sizes: tuple[int, ...]) -> Tensor:
    """The transpose of :func:`box_sum`: each pixel gathers from the windows that contain it.

    That is a sum over windows too, of the same size and stride 1, after zeros are put between the
    positions.

    Shape:
        - Input: :math:`(*, P_1, ..., P_d)`
        - Output: :math:`(*, L_1, ..., L_d)` with ``sizes`` for :math:`L_1, ..., L_d`
    """
    if geometry.pointwise:
        return maps
    d = len(sizes)
    for i, step in enumerate(geometry.stride):
        maps = _spread(maps, i - d, step)
    pads = []
    for i, size in enumerate(sizes):
        before = geometry.reach(i) - 1 - geometry.padding[i]
        pads.append((before, size + geometry.reach(i) - 1 - before - maps.shape[i - d]))
    return _sum_taps(_pad(maps, pads), geometry._replace(stride=(1,) * d))


def _spread(maps: Tensor, axis: int, step: int) -> Tensor:
    """Zeros between the entries along an axis, counted from the last, and after them."""
    if step == 1:
        return maps
    zeros = maps.new_zeros(()).expand_as(maps).unsqueeze(axis)
    spread = torch.cat([maps.unsqueeze(axis), *[zeros] * (step - 1)], axis)
    return once(spread).flatten(axis - 1, axis)


def _pad(maps: Tensor, pads: list[tuple[int, int]]) -> Tensor:
    if all(pair == (0, 0) for pair in pads):
        return maps
    return once(F.pad(maps, [size for pair in reversed(pads) for size in pair]))


def _sum_taps(maps: Tensor, geometry: Geometry) -> Tensor:
    """The sum over the pixels of each window, one dimension after the other."""
    d = len(geometry.stride)
    for i, step in enumerate(geometry.stride):
        span = maps.shape[i - d] - geometry.reach(i) + 1
        after: tuple[Any, ...] = (slice(None),) * (d - 1 - i)
        taps = [
            maps[(..., slice(offset, offset + span, step), *after)]
            for offset in range(0, geometry.reach(i), geometry.dilation[i])
        ]
        maps = functools.reduce(torch.add, taps)
        if len(taps) > 1:
            once(maps)
    return maps
