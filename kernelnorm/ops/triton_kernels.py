"""The row primitives of :mod:`kernelnorm.ops.rows_torch` as one Triton kernel each.

A program takes a block of pixels and goes through their channels, a block at a time: what is
summed over channels stays in registers, and each large tensor is read once. Each of these comes as
a pointer and its strides, of samples, pixels and channels; maps, pairs and vectors are contiguous.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernelnorm.ops.mask import HASH_MULTIPLIER

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

AVAILABLE = triton is not None


def _jit(function: Callable[..., Any]) -> Any:
    """Makes it a kernel. Its arguments are to have no types: Triton would look these up."""
    return triton.jit(function) if AVAILABLE else function


@_jit
def _double(bits):
    """A double-precision argument, which is passed as the integer that has its bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@_jit
def _narrow(x):
    """In the dtype of sums over channels."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@_jit
def _block(pixels, BLOCK_P: tl.constexpr):
    """This program's sample, its pixels in it, which of them exist, and their place in maps."""
    program = tl.program_id(0).to(tl.int64)  # there are tensors of more than 2**31 elements
    blocks = tl.cdiv(pixels, BLOCK_P)
    sample = program // blocks
    pixel = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    return sample, pixel, pixel < pixels, sample * pixels + pixel


@_jit
def _keep(pixel_keys, channel_keys, first_kept, MULTIPLIER: tl.constexpr = HASH_MULTIPLIER):
    """See :func:`kernelnorm.ops.mask.keep`."""
    element = pixel_keys[:, None] * channel_keys[None, :]
    element = (element ^ ((element >> 15) & 0x1FFFF)) * MULTIPLIER
    return element >= first_kept


@_jit
def statistics(
    x, x_n, x_p, x_c,
    pixel_keys, channel_keys, first_kept, pair,
    size, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums the differences to a pixel's first channel, which are small, and adds it afterwards."""
    sample, pixel, exists, place = _block(pixels, BLOCK_P)
    rows = x + sample * x_n + pixel * x_p
    first = _narrow(tl.load(rows, exists, 0))
    total = tl.zeros_like(first)
    square = tl.zeros_like(first)
    kept = tl.zeros_like(first)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = exists[:, None] & (channel < channels)[None, :]
        value = _narrow(tl.load(rows[:, None] + channel[None, :] * x_c, inside, 0))
        difference = tl.where(inside, value - first[:, None], 0)
        if pixel_keys is not None:
            of_pixels = tl.load(pixel_keys + place, exists, 0)
            of_channels = tl.load(channel_keys + channel, channel < channels, 0)
            mask = (inside & _keep(of_pixels, of_channels, first_kept)).to(first.dtype)
            difference *= mask
            kept += tl.sum(mask, 1)
        total += tl.sum(difference, 1)
        square += tl.sum(difference * difference, 1)
    base = first.to(tl.float64)
    shift = base
    if pixel_keys is not None:
        shift = base * (kept.to(tl.float64) / channels)
    mean = total.to(tl.float64) / channels
    mean_square = square.to(tl.float64) / channels
    tl.store(pair + place, mean + shift, exists)
    tl.store(pair + size + place, mean_square + (2 * mean + shift) * base, exists)


@_jit
def moments(
    sums, factor_1, factor_2, kappa, eps, mu, r, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Over maps, element by element."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < size
    mean = tl.load(sums + place, exists, 0) * _double(factor_1)
    square = tl.load(sums + size + place, exists, 0) * _double(factor_2)
    var = square - mean * mean
    var = tl.where(var < 0, 0, var)
    var += _double(kappa) * (var + mean * mean)
    tl.store(mu + place, mean, exists)
    tl.store(r + place, 1 / tl.sqrt(tl.where(exists, var + _double(eps), 1)), exists)


@_jit
def epilogue(
    z, z_n, z_p, z_c, y, y_n, y_p, y_c,
    map_1, vector_1, map_2, vector_2, r, bias,
    size, pixels, channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Without a ReLU it leaves the numerator in ``z``."""
    sample, pixel, exists, place = _block(pixels, BLOCK_P)
    z += sample * z_n + pixel * z_p
    y += sample * y_n + pixel * y_p
    scale = tl.load(r + place, exists, 0)
    first = tl.load(map_1 + place, exists, 0)
    if map_2 is not None:
        second = tl.load(map_2 + place, exists, 0)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
        valid = channel < channels
        inside = exists[:, None] & valid[None, :]
        at = z[:, None] + channel[None, :] * z_c
        numerator = tl.load(at, inside, 0).to(scale.dtype)
        numerator -= first[:, None] * tl.load(vector_1 + channel, valid, 0)[None, :]
        if map_2 is not None:
            numerator -= second[:, None] * tl.load(vector_2 + channel, valid, 0)[None, :]
        output = numerator * scale[:, None]
        if bias is not None:
            output += tl.load(bias + channel, valid, 0).to(scale.dtype)[None, :]
        if RELU:
            output = tl.where(output < 0, 0, output)  # unlike a maximum, it keeps NaN
        else:
            tl.store(at, numerator, inside)
        tl.store(y[:, None] + channel[None, :] * y_c, output, inside)


@_jit
def output_gradient(
    kept, kept_n, kept_p, kept_c,
    grad, grad_n, grad_p, grad_c,
    grad_z, grad_z_n, grad_z_p, grad_z_c,
    r, mu, sums, bias, factor_1, factor_2, pair, parts,
    size, pixels, channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Each program writes its own part of the sums over pixels."""
    sample, pixel, exists, place = _block(pixels, BLOCK_P)
    kept += sample * kept_n + pixel * kept_p
    grad += sample * grad_n + pixel * grad_p
    grad_z += sample * grad_z_n + pixel * grad_z_p
    part = parts + tl.program_id(0).to(tl.int64) * channels
    other_part = part + tl.num_programs(0).to(tl.int64) * channels
    scale = tl.load(r + place, exists, 1)
    mean = tl.load(mu + place, exists, 0)
    with_kept = tl.zeros_like(scale)
    with_bias = tl.zeros_like(scale)
    with_sums = tl.zeros_like(scale)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
        valid = channel < channels
        inside = exists[:, None] & valid[None, :]
        k = tl.load(kept[:, None] + channel[None, :] * kept_c, inside, 0).to(scale.dtype)
        g = tl.load(grad[:, None] + channel[None, :] * grad_c, inside, 0).to(scale.dtype)
        if RELU:
            g = tl.where(k <= 0, 0, g)
            if bias is not None:
                of_bias = tl.load(bias + channel, valid, 0).to(scale.dtype)
                with_bias += tl.sum(g * of_bias[None, :], 1)
        with_kept += tl.sum(g * k, 1)
        with_sums += tl.sum(g * tl.load(sums + channel, valid, 0)[None, :], 1)
        of_z = (g * scale[:, None]).to(grad_z.dtype.element_ty)
        tl.store(grad_z[:, None] + channel[None, :] * grad_z_c, of_z, inside)
        tl.store(part + channel, tl.sum(g, 0), valid)
        tl.store(other_part + channel, tl.sum(of_z.to(scale.dtype) * mean[:, None], 0), valid)
    grad_r = with_kept
    if RELU:
        grad_r = (with_kept - with_bias) / scale
    grad_var = -0.5 * scale * scale * scale * grad_r
    grad_mean = -scale * with_sums - 2 * mean * grad_var
    tl.store(pair + place, grad_mean * _double(factor_1), exists)
    tl.store(pair + size + place, grad_var * _double(factor_2), exists)


@_jit
def input_gradient(
    x, x_n, x_p, x_c, grad, grad_n, grad_p, grad_c,
    pair, pixel_keys, channel_keys, first_kept,
    size, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds to ``grad`` in place."""
    sample, pixel, exists, place = _block(pixels, BLOCK_P)
    x += sample * x_n + pixel * x_p
    grad += sample * grad_n + pixel * grad_p
    a = tl.load(pair + place, exists, 0)
    b = tl.load(pair + size + place, exists, 0)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
        valid = channel < channels
        inside = exists[:, None] & valid[None, :]
        value = tl.load(x[:, None] + channel[None, :] * x_c, inside, 0).to(a.dtype)
        through = a[:, None] + b[:, None] * value
        if pixel_keys is not None:
            of_pixels = tl.load(pixel_keys + place, exists, 0)
            of_channels = tl.load(channel_keys + channel, valid, 0)
            through *= _keep(of_pixels, of_channels, first_kept).to(a.dtype)
        at = grad[:, None] + channel[None, :] * grad_c
        tl.store(at, through + tl.load(at, inside, 0).to(a.dtype), inside)
