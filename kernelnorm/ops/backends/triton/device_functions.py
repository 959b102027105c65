"""Functions that the Triton kernels call: blocks of pixels and channels, and masks."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernelnorm.ops.mask import HASH_MULTIPLIER

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = [
    "AVAILABLE",
    "accumulator",
    "block_of_channels",
    "block_of_pixels",
    "double",
    "is_kept",
    "jit",
    "keep",
    "keys_of_pixels",
    "tl",
]

AVAILABLE = triton is not None


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function. Its arguments have no annotations: Triton would interpret them."""
    return triton.jit(function) if AVAILABLE else function


@jit
def double(bits):
    """A double-precision argument, which is passed as the integer that has its bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@jit
def accumulator(x):
    """``x`` in the dtype of sums over channels."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@jit
def block_of_pixels(pixels, BLOCK_P: tl.constexpr):
    """This program's sample, its pixels in it, which of them exist, and their place in maps."""
    program = tl.program_id(0).to(tl.int64)  # tensors may have more than 2**31 elements
    blocks = tl.cdiv(pixels, BLOCK_P)
    sample = program // blocks
    pixel = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    return sample, pixel, pixel < pixels, sample * pixels + pixel


@jit
def block_of_channels(start, channels, exists, BLOCK_C: tl.constexpr):
    """The channels from ``start``, which of them exist, and which elements of the block do."""
    channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
    valid = channel < channels
    return channel, valid, exists[:, None] & valid[None, :]


@jit
def keys_of_pixels(
    keys, place, exists, channels, samples, size_0, size_1, size_2, DIMS: tl.constexpr
):
    """See :func:`kernelnorm.ops.mask.expand_keys`. ``size_2`` is the size of the last dimension."""
    volume = size_0 * size_1 * size_2
    first_size = size_2 if DIMS == 1 else (size_1 if DIMS == 2 else size_0)
    inner = volume // first_size
    first = keys + channels
    key = tl.load(first + place // inner, exists, 0) | 1
    if DIMS == 3:
        second = first + samples * first_size
        key *= tl.load(second + place // size_2 % size_1, exists, 0) | 1
        key *= tl.load(second + size_1 + place % size_2, exists, 0) | 1
    if DIMS == 2:
        key *= tl.load(first + samples * first_size + place % size_2, exists, 0) | 1
    return key


@jit
def keep(pixel_keys, channel_keys, threshold):
    """See :func:`kernelnorm.ops.mask.keep`."""
    return is_kept(pixel_keys[:, None] * (channel_keys | 1)[None, :], threshold)


@jit
def is_kept(element, threshold, MULTIPLIER: tl.constexpr = HASH_MULTIPLIER):
    """True where the mask keeps an element; ``element`` is the product of all its keys."""
    element = (element ^ ((element >> 15) & 0x1FFFF)) * MULTIPLIER
    return element >= threshold
