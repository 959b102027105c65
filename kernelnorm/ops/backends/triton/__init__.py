"""The primitives as Triton kernels, for GPUs; the eager backend has the formulas.

Before a kernel runs, its caller here allocates the results and chooses strides and block sizes. One
kernel serves every memory format, since it takes the strides of samples, pixels and channels.

The same inputs give the same bits each time: block sizes, which determine the order of summation,
follow from shapes and not from timings; and there are no atomic additions.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from kernelnorm.ops.backends import Statistics, compute_dtype, eager
from kernelnorm.ops.backends.triton import device_functions, kernels
from kernelnorm.ops.mask import keep_threshold
from kernelnorm.ops.settings import Settings, constants
from kernelnorm.ops.strides import single_stride, with_pixel_stride
from kernelnorm.ops.windows import Geometry

__all__ = [
    "centres_filters",
    "convolution",
    "convolution_backward",
    "epilogue",
    "epilogue_backward",
    "name",
    "statistics_backward",
    "supports",
    "window_statistics",
]

name = "triton"
centres_filters = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True if Triton was told to run kernels in Python, on tensors of any device."""

TILE = 4096
"""The most elements that a program holds of each tensor: 16 for each of 256 threads."""

PROGRAMS = 512
"""The number of programs that block sizes aim at: a few for each multiprocessor."""

_log = logging.getLogger(__name__)

convolution = eager.convolution
convolution_backward = eager.convolution_backward


def supports(x: Tensor) -> bool:
    """True for non-empty floating-point tensors on a GPU for which Triton can compile.

    While a compiler traces, new tensors are its own and have no memory, so nothing can be tried.
    """
    return (
        device_functions.AVAILABLE
        and (x.is_cuda or INTERPRETED)
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and x.numel() > 0
        and prod(x.shape[2:]) < 1 << 31  # kernels multiply sizes as 32-bit integers
        and (type(torch.empty(0)) is not Tensor or _works(x.device, x.dtype))
    )


def window_statistics(
    x: Tensor, keys: Tensor | None, settings: Settings, with_means: bool
) -> Statistics:
    """See :func:`kernelnorm.ops.backends.eager.window_statistics`."""
    x, geometry = with_pixel_stride(x), settings.geometry
    factors = constants(settings, x.shape[1])
    sizes, positions, *others = _three(x.shape[2:], geometry)
    maps = torch.empty((2, len(x), *x.shape[2:]), dtype=torch.float64, device=x.device)
    dtype, shape = compute_dtype(x), (len(x), 1, *positions[5 - x.dim() :])
    mu = torch.empty(shape, dtype=torch.float64 if with_means else dtype, device=x.device)
    rstd = torch.empty(shape, dtype=dtype, device=x.device)
    _launch(
        kernels.pixel_statistics, [x], keys, keep_threshold(settings.p), maps, len(x), *sizes,
        DIMS=x.dim() - 2,
    )  # fmt: skip
    square = factors.square * (1 + factors.dropout_variance)
    with torch.cuda.device_of(x):
        kernels.window_statistics[(-(-mu.numel() // 128),)](
            maps, mu, rstd, *map(_bits, (factors.mean, square, settings.eps)), maps[0].numel(),
            mu.numel(), *(n for group in (sizes, positions, *others) for n in group), BLOCK=128,
        )  # fmt: skip
    if not with_means:
        return Statistics(mu, rstd)
    means = eager.window_means(x, settings)
    return Statistics(mu.to(dtype), rstd, (mu - means).to(dtype), means.to(dtype))


def epilogue(
    z: Tensor,
    terms: list[tuple[Tensor, Tensor]],
    rstd: Tensor,
    bias: Tensor | None,
    slope: float | None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`kernelnorm.ops.backends.eager.epilogue`."""
    if any(map_.shape[1] > 1 for map_, _ in terms):
        return eager.epilogue(z, terms, rstd, bias, slope)
    z = with_pixel_stride(z)
    y = torch.empty_like(z) if slope is None else z
    flat = [t.contiguous() for term in terms for t in term]
    missing = [None] * (4 - len(flat))
    bias = None if bias is None else bias.resolve_neg().contiguous()
    _launch(kernels.epilogue, [z, y], *flat, *missing, rstd.contiguous(), bias, SLOPE=slope)
    return y, z if slope is None else None


def epilogue_backward(
    grad: Tensor,
    kept: Tensor,
    statistics: Statistics,
    filter_sums: Tensor,
    bias: Tensor | None,
    slope: float | None,
    factors: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kernelnorm.ops.backends.eager.epilogue_backward`."""
    kept = with_pixel_stride(kept)
    mu, rstd = statistics.mu.contiguous(), statistics.rstd.contiguous()
    grad_z = torch.empty_like(kept)
    large = [kept, with_pixel_stride(grad), grad_z]
    pair = torch.empty((len(kept), 2, *kept.shape[2:]), dtype=rstd.dtype, device=rstd.device)
    programs = _tiles(kept.shape, *(x.stride() for x in large))[0]
    parts = torch.empty((2, programs, len(filter_sums)), dtype=rstd.dtype, device=rstd.device)
    bias = None if bias is None else bias.resolve_neg().contiguous()
    _launch(
        kernels.epilogue_backward, large, rstd, mu, filter_sums.contiguous(), bias,
        *map(_bits, factors), pair, parts, prod(kept.shape[2:]), SLOPE=slope,
    )  # fmt: skip
    return grad_z, pair, parts[0].sum(0), parts[1].sum(0)


def statistics_backward(
    grad: Tensor, x: Tensor, pair: Tensor, keys: Tensor | None, settings: Settings
) -> Tensor:
    """See :func:`kernelnorm.ops.backends.eager.statistics_backward`."""
    grad = with_pixel_stride(grad)
    numbers = [n for group in _three(x.shape[2:], settings.geometry) for n in group]
    _launch(
        kernels.statistics_backward, [with_pixel_stride(x), grad], pair.contiguous(), keys,
        keep_threshold(settings.p), len(x), *numbers, DIMS=x.dim() - 2,
    )  # fmt: skip
    return grad


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Compile and run a kernel once: Triton needs a recent GPU and a C compiler."""
    pair = torch.zeros(1, 2, 1, device=device, dtype=torch.promote_types(dtype, torch.float32))
    window = Settings(Geometry((1,), (1,), (0,), (1,)), 1, 0.0, False, 1.0, None)
    x = torch.ones(1, 1, 1, device=device, dtype=dtype)
    try:
        statistics_backward(x.clone(), x, pair, None, window)
    except Exception as error:  # whatever the cause, the eager backend works
        _log.warning("Triton failed, so KNConvs are slower on this GPU: %s", error)
        return False
    return True


def _launch(kernel: Any, large: list[Tensor], *arguments: Any, **options: Any) -> None:
    """Run a kernel on large tensors of one shape, and on its other arguments."""
    programs, strides, sizes = _tiles(large[0].shape, *(x.stride() for x in large))
    layout = [item for x, of_x in zip(large, strides, strict=True) for item in (x, *of_x)]
    with torch.cuda.device_of(large[0]):  # Triton launches on the current device
        kernel[(programs,)](*layout, *arguments, **sizes, **options)


@functools.lru_cache(maxsize=4096)
def _tiles(
    shape: tuple[int, ...], *strides: tuple[int, ...]
) -> tuple[int, list[tuple[int, int, int]], dict[str, int]]:
    """How a kernel goes through tensors of one shape.

    Returns:
        the number of programs; each tensor's strides of samples, pixels and channels; the numbers
        of all pixels, of pixels in a sample and of channels, the block sizes and the number of
        warps
    """
    n, channels, *spatial = shape
    # Where one stride leads through the pixels of all samples, these are one long sample.
    merged = all(single_stride((n, *spatial), (s[0], *s[2:])) is not None for s in strides)
    steps = []
    for s in strides:
        step = (
            single_stride((n, *spatial), (s[0], *s[2:]))
            if merged
            else single_stride(spatial, s[2:])
        )
        assert step is not None, "with_pixel_stride() is called first"
        steps.append((s[0], step, s[1]))
    size = n * prod(spatial)
    pixels = size if merged else prod(spatial)

    # At least a cache line of 128 bytes along the contiguous dimension, and enough programs.
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


@functools.lru_cache(maxsize=4096)
def _three(spatial: Sequence[int], geometry: Geometry) -> list[tuple[int, ...]]:
    """Sizes, positions, kernel, stride, padding, dilation: each of three dimensions."""
    positions = [geometry.positions(i, size) for i, size in enumerate(spatial)]
    groups = spatial, positions, *geometry
    missing = (1, 1, 1, 1, 0, 1)
    return [(*[m] * (3 - len(g)), *g) for m, g in zip(missing, groups, strict=True)]


def _power(x: int) -> int:
    """The smallest power of two that is at least ``x``."""
    return 1 << max(x - 1, 0).bit_length()


def _bits(x: float) -> int:
    """The bits of a double as an integer argument: Triton passes floats in single precision."""
    bits: int = struct.unpack("q", struct.pack("d", x))[0]
    return bits
