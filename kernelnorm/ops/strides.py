"""Tensors of shape :math:`(N, C, *)` as kernels see them: samples, pixels and channels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Strides(NamedTuple):
    """Strides in elements, for any memory format, also of slices and expanded tensors."""

    sample: int
    pixel: int
    channel: int


@functools.lru_cache(maxsize=4096)
def strides_of(shape: Sequence[int], stride: Sequence[int]) -> Strides | None:
    """The strides of a tensor, or ``None`` if no single stride leads through its pixels."""
    pixel = single_stride(shape[2:], stride[2:])
    return None if pixel is None else Strides(stride[0], pixel, stride[1])


def single_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride that leads from each element to the next, or ``None`` if there is none."""
    single, expected = None, None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if expected is None:
                single = stride
            elif stride != expected:
                return None
            expected = stride * size
    return 1 if single is None else single


def with_pixel_stride(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if no single stride leads through its pixels."""
    x = x.resolve_neg()  # a lazy negation, as of the imaginary part of a conjugate
    return x if strides_of(x.shape, x.stride()) is not None else x.contiguous()


def without_overlap(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if it has no single pixel stride or elements may overlap."""
    return x if _has_no_overlap(x.shape, x.stride()) else x.contiguous()


@functools.lru_cache(maxsize=4096)
def _has_no_overlap(shape: Sequence[int], stride: Sequence[int]) -> bool:
    if strides_of(shape, stride) is None:
        return False
    reach = 0  # largest offset along the dimensions with smaller strides
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n > 1):
        if step <= reach:
            return False
        reach += step * (size - 1)
    return True
