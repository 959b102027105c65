"""The row primitives of :mod:`kernelnorm.ops.rows_torch` as one Triton kernel each, for GPUs.

A program takes a block of pixels and goes through their channels, a block at a time: what is
summed over channels stays in registers, and each large tensor is read once. Where an element lies
is computed from three strides, of samples, pixels and channels, so that one kernel serves every
memory format: ``channels_last``, ``contiguous`` and slices of either.

The same inputs give the same bits each time: block sizes follow from shapes, not from timings, as
another block size is another order of summation; and there are no atomic additions.

Triton is part of PyTorch for GPUs. Without it this module can be imported, and supports nothing.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import logging
import os
import struct
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from kernelnorm.ops import rows_torch
from kernelnorm.ops.mask import HASH_MULTIPLIER, Keys

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton was told to run kernels in Python, on tensors of any device."""

TILE = 4096
"""The most elements that a program holds of each tensor: 16 for each of 256 threads."""

PROGRAMS = 512
"""Blocks of pixels are halved until there are as many: a few for each multiprocessor."""

_log = logging.getLogger(__name__)


def supports(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor of floats on a GPU for which Triton can compile."""
    if triton is None or not (x.is_cuda or INTERPRETED):
        return False
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return not torch.onnx.is_in_onnx_export()  # ONNX has no such operators
    return type(x) in (Tensor, torch.nn.Parameter) and _works(x.device, x.dtype)


def statistics(x: Tensor, keys: Keys | None) -> Tensor:
    """See :func:`kernelnorm.ops.rows_torch.statistics`."""
    shape = 2, x.shape[0], 1, *x.shape[2:]
    pair = torch.empty(shape, dtype=rows_torch.wide(x), device=x.device)
    _statistics(_collapsible(x), *_flat_keys(keys), pair)
    return pair


def moments(
    sums: Tensor, factors: tuple[float, float], kappa: float, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`kernelnorm.ops.rows_torch.moments`."""
    mu = torch.empty(sums.shape[1:], dtype=dtype, device=sums.device)
    r = torch.empty_like(mu)
    _moments(sums.contiguous(), *factors, kappa, eps, mu, r)
    return mu, r


def epilogue(
    z: Tensor,
    maps: list[Tensor],
    vectors: list[Tensor],
    r: Tensor,
    bias: Tensor | None,
    relu: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`kernelnorm.ops.rows_torch.epilogue`."""
    reachable = into is None or _stride(into.shape[2:], into.stride()[2:]) is not None
    if len(maps) > 2 or any(m.shape[1] > 1 for m in maps) or not reachable:
        return rows_torch.epilogue(z, maps, vectors, r, bias, relu, into)
    z = _collapsible(z)
    y = torch.empty_like(z) if into is None and not relu else into
    terms = [t.contiguous() for pair in zip(maps, vectors, strict=True) for t in pair]
    none = [None] * (4 - len(terms))
    bias = None if bias is None else bias.contiguous()
    _epilogue(z, *terms, *none, r.contiguous(), bias, relu, y)
    return z if y is None else y, None if relu else z


def output_gradient(
    grad: Tensor,
    kept: Tensor,
    r: Tensor,
    mu: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    relu: bool,
    factors: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kernelnorm.ops.rows_torch.output_gradient`."""
    kept = _collapsible(kept)
    grad_z = torch.empty_like(kept)
    pair = torch.empty((2, *r.shape), dtype=r.dtype, device=r.device)
    vectors = torch.empty((2, *sums.shape), dtype=r.dtype, device=r.device)
    _output_gradient(
        _collapsible(grad), kept, r.contiguous(), mu.contiguous(), sums.contiguous(),
        None if bias is None else bias.contiguous(), relu, *factors, grad_z, pair, vectors,
    )  # fmt: skip
    grad_bias, grad_sums = vectors.unbind()
    return grad_z, pair, grad_bias, grad_sums


def input_gradient(grad: Tensor, x: Tensor, pair: Tensor, keys: Keys | None) -> Tensor:
    """See :func:`kernelnorm.ops.rows_torch.input_gradient`."""
    grad = _collapsible(grad)
    _input_gradient(grad, _collapsible(x), pair.contiguous(), *_flat_keys(keys))
    return grad


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Tries it once: old GPUs and machines without a C compiler are not for Triton."""
    try:
        statistics(torch.ones(1, 1, 1, device=device, dtype=dtype), None)
    except Exception as error:  # whatever is wrong, there is another way
        _log.warning("Triton failed, so kernel normalisation is slower: %s", error)
        return False
    return True


def _operator(*mutated: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a launch an operator that compilers see, for them alone: operators are slow to call."""

    def decorator(function: Callable[..., None]) -> Callable[..., None]:
        name = f"kernelnorm::{function.__name__.strip('_')}"
        operator = torch.library.custom_op(name, function, mutates_args=mutated)

        def call(*arguments: Any) -> None:
            (operator if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return decorator


@_operator("pair")
def _statistics(
    x: Tensor, pixels: Tensor | None, channels: Tensor | None, first_kept: int, pair: Tensor
) -> None:
    _launch(_statistics_kernel, [x], pixels, channels, first_kept, pair)


@_operator("mu", "r")
def _moments(
    sums: Tensor,
    factor_1: float,
    factor_2: float,
    kappa: float,
    eps: float,
    mu: Tensor,
    r: Tensor,
) -> None:
    scalars = [_bits(x) for x in (factor_1, factor_2, kappa, eps)]
    with torch.cuda.device_of(sums):
        _moments_kernel[(triton.cdiv(mu.numel(), 256),)](
            sums, *scalars, mu, r, mu.numel(), BLOCK=256
        )


@_operator("z", "y")
def _epilogue(
    z: Tensor,
    map_1: Tensor,
    vector_1: Tensor,
    map_2: Tensor | None,
    vector_2: Tensor | None,
    r: Tensor,
    bias: Tensor | None,
    relu: bool,
    y: Tensor | None,
) -> None:
    """With a ReLU, the output is in place if there is no tensor for it."""
    large = [z, z if y is None else y]
    _launch(_epilogue_kernel, large, map_1, vector_1, map_2, vector_2, r, bias, RELU=relu)


@_operator("grad_z", "pair", "vectors")
def _output_gradient(
    grad: Tensor,
    kept: Tensor,
    r: Tensor,
    mu: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    relu: bool,
    factor_1: float,
    factor_2: float,
    grad_z: Tensor,
    pair: Tensor,
    vectors: Tensor,
) -> None:
    large = [kept, grad, grad_z]
    programs = _tiles(kept.shape, *(x.stride() for x in large))[0]
    parts = torch.empty((2, programs, len(sums)), dtype=r.dtype, device=r.device)
    scalars = _bits(factor_1), _bits(factor_2)
    _launch(_output_gradient_kernel, large, r, mu, sums, bias, *scalars, pair, parts, RELU=relu)
    torch.sum(parts, 1, out=vectors)


@_operator("grad")
def _input_gradient(
    grad: Tensor,
    x: Tensor,
    pair: Tensor,
    pixels: Tensor | None,
    channels: Tensor | None,
    first_kept: int,
) -> None:
    _launch(_input_gradient_kernel, [x, grad], pair, pixels, channels, first_kept)


def _launch(kernel: Any, large: list[Tensor], *arguments: Any, **constants: bool) -> None:
    """Runs a kernel over tensors of one shape, and over what else it takes."""
    programs, strides, sizes = _tiles(large[0].shape, *(x.stride() for x in large))
    layout = [item for x, of_x in zip(large, strides, strict=True) for item in (x, *of_x)]
    with torch.cuda.device_of(large[0]):  # Triton launches on the current device
        kernel[(programs,)](*layout, *arguments, **sizes, **constants)


@functools.lru_cache(maxsize=4096)
def _tiles(
    shape: tuple[int, ...], *strides: tuple[int, ...]
) -> tuple[int, list[tuple[int, int, int]], dict[str, int]]:
    """How a kernel goes through tensors of one shape.

    Returns:
        the number of programs; each tensor's strides of samples, pixels and channels; the numbers
        of all pixels, of pixels in a sample and of channels, and the block sizes
    """
    n, channels, *spatial = shape
    # Where one stride leads through the pixels of all samples, these are as one.
    merged = all(_stride((n, *spatial), (s[0], *s[2:])) is not None for s in strides)
    steps = []
    for s in strides:
        step = _stride((n, *spatial), (s[0], *s[2:])) if merged else _stride(spatial, s[2:])
        assert step is not None  # or else it would be a copy
        steps.append((s[0], step, s[1]))
    size = n * prod(spatial)
    pixels = size if merged else prod(spatial)

    # A cache line of 128 bytes along whatever lies side by side, and enough programs.
    planes = steps[0][1] == 1
    widest = TILE // min(_power(channels), 32 if planes else 64)
    block_p = min(max(_power(size // PROGRAMS), 32 if planes else 1), widest, _power(pixels))
    block_c = min(_power(channels), TILE // block_p)
    sizes = {
        "size": size,
        "pixels": pixels,
        "channels": channels,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "num_warps": max(1, block_p * block_c // (TILE // 8)),
    }
    programs = -(-pixels // block_p) * (1 if merged else n)
    return programs, steps, sizes


def _stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride that leads from each element to the next, if one does."""
    one, expected = None, None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if expected is None:
                one = stride
            elif stride != expected:
                return None
            expected = stride * size
    return 1 if one is None else one


def _collapsible(x: Tensor) -> Tensor:
    """``x``, or a copy if no one stride leads through the pixels of a sample."""
    return x.contiguous() if _stride(x.shape[2:], x.stride()[2:]) is None else x


def _flat_keys(keys: Keys | None) -> tuple[Tensor | None, Tensor | None, int]:
    if keys is None:
        return None, None, 0
    return keys.pixels.flatten(), keys.channels.flatten(), keys.first_kept


def _power(x: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(x - 1, 0).bit_length()


def _bits(x: float) -> int:
    """A number for :func:`_double`: of Python's floats, Triton makes single precision."""
    bits: int = struct.unpack("q", struct.pack("d", x))[0]
    return bits


def _jit(function: Callable[..., Any]) -> Any:
    """Makes it a kernel. Its arguments are to have no types: Triton would look these up."""
    return function if triton is None else triton.jit(function)


@_jit
def _double(bits):
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
def _statistics_kernel(
    x, x_n, x_p, x_c,
    pixel_keys, channel_keys, first_kept, pair,
    size, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
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
def _moments_kernel(
    sums, factor_1, factor_2, kappa, eps, mu, r, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
def _epilogue_kernel(
    z, z_n, z_p, z_c, y, y_n, y_p, y_c,
    map_1, vector_1, map_2, vector_2, r, bias,
    size, pixels, channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
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
def _output_gradient_kernel(
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
def _input_gradient_kernel(
    x, x_n, x_p, x_c, grad, grad_n, grad_p, grad_c,
    pair, pixel_keys, channel_keys, first_kept,
    size, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
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
