"""The row primitives of :mod:`kernelnorm.ops.rows_torch` as one launch of a kernel each, for GPUs.

Here is what happens before a kernel of :mod:`kernelnorm.ops.triton_kernels` runs: results are
allocated, and block sizes and strides are chosen. Where an element lies follows from three strides,
of samples, pixels and channels, so that one kernel serves every memory format: ``channels_last``,
``contiguous`` and slices of either.

The same inputs give the same bits each time: block sizes follow from shapes, not from timings, as
another block size is another order of summation; and there are no atomic additions.

Triton is part of PyTorch for GPUs. Without it this module can be imported, and supports nothing.
"""

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

from kernelnorm.ops import rows_torch, triton_kernels
from kernelnorm.ops.mask import Keys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton was told to run kernels in Python, on tensors of any device."""

TILE = 4096
"""The most elements that a program holds of each tensor: 16 for each of 256 threads."""

PROGRAMS = 512
"""Blocks of pixels are halved until there are as many: a few for each multiprocessor."""

_log = logging.getLogger(__name__)


def supports(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor of floats on a GPU for which Triton can compile."""
    if not triton_kernels.AVAILABLE or not (x.is_cuda or INTERPRETED):
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
    _launch(triton_kernels.statistics, [x], pixels, channels, first_kept, pair)


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
        programs = -(-mu.numel() // 256)
        triton_kernels.moments[(programs,)](sums, *scalars, mu, r, mu.numel(), BLOCK=256)


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
    _launch(triton_kernels.epilogue, large, map_1, vector_1, map_2, vector_2, r, bias, RELU=relu)


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
    small = r, mu, sums, bias, _bits(factor_1), _bits(factor_2)
    _launch(triton_kernels.output_gradient, large, *small, pair, parts, RELU=relu)
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
    _launch(triton_kernels.input_gradient, [x, grad], pair, pixels, channels, first_kept)


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
    """A double's bits for a kernel: of Python's floats, Triton makes single precision."""
    bits: int = struct.unpack("q", struct.pack("d", x))[0]
    return bits
