"""The primitives as kernels in C, for CPUs; :mod:`kernelnorm.ops.backends.eager` has the formulas.

Before a kernel runs, its caller here checks shapes, strides and dtypes and allocates the results.
One kernel serves every memory format, since it takes the strides of samples, pixels and channels.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from kernelnorm.ops.backends import Statistics, compute_dtype
from kernelnorm.ops.backends.cpu.convolution import convolution, convolution_backward
from kernelnorm.ops.backends.cpu.library import Call, Library, Strides, library
from kernelnorm.ops.mask import count_keys, keep_threshold
from kernelnorm.ops.settings import Settings, constants
from kernelnorm.ops.strides import collapsible, strides_of, writable
from kernelnorm.ops.windows import Geometry

__all__ = [
    "convolution",
    "convolution_backward",
    "epilogue",
    "epilogue_backward",
    "name",
    "statistics_backward",
    "supports",
    "window_statistics",
]

name = "cpu"

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_TILE = 64
"""The pixels that a loop handles at once, as in kernels.c."""

_ELEMENTS_PER_THREAD = 1 << 14
"""Fewer elements than that take less time than waking another thread."""


def supports(x: Tensor) -> bool:
    """True for float32, float64 and bfloat16 tensors on a CPU for which the kernels were built."""
    return x.is_cpu and x.dtype in _DTYPES and x.numel() > 0 and library() is not None


def window_statistics(
    x: Tensor, keys: Tensor | None, settings: Settings, with_means: bool
) -> Statistics:
    """See :func:`kernelnorm.ops.backends.eager.window_statistics`."""
    x = collapsible(x)
    call = _windows(x.dtype, x.shape, settings, torch.get_num_threads())
    dtype, shape = compute_dtype(x), (len(x), 1, *_positions(x.shape, settings.geometry))
    workspace = (2 + settings.groups) * x.numel() // x.shape[1] + call.threads * call.scratch
    maps = torch.empty(workspace, dtype=torch.float64, device="cpu")
    mu = torch.empty(shape, dtype=dtype, device="cpu")
    rstd = torch.empty_like(mu)
    offset = means = None
    if with_means:
        offset = mu.new_empty(len(x), settings.groups, *shape[2:])
        means = torch.empty_like(offset)
    count = mu.numel()
    _kernels().window_statistics(
        call, *_large(x, x), _keys(keys, x.shape), maps.data_ptr(), _pointer(mu, dtype, count),
        _pointer(rstd, dtype, count), _pointer(offset, dtype, settings.groups * count),
        _pointer(means, dtype, settings.groups * count),
    )  # fmt: skip
    return Statistics(mu, rstd, offset, means)


def epilogue(
    z: Tensor,
    terms: list[tuple[Tensor, Tensor]],
    rstd: Tensor,
    bias: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`kernelnorm.ops.backends.eager.epilogue`."""
    z = writable(z)
    y = None if relu else torch.empty_like(z)
    groups, dtype, channels = terms[0][0].shape[1], rstd.dtype, z.shape[1]
    call = _outputs(z.dtype, z.shape, groups, relu, (0.0, 0.0), torch.get_num_threads())
    tensors = [_flat(tensor, dtype) for term in terms for tensor in term]
    tensors += [None] * (4 - len(tensors))
    pixels = z.numel() // channels
    counts = (groups * pixels, channels) * 2
    rstd, bias = rstd.contiguous(), _flat(bias, dtype)
    _kernels().epilogue(
        call, *_large(z, z), *(_large(y, z) if y is not None else (None, None)),
        *(_pointer(t, dtype, count) for t, count in zip(tensors, counts, strict=True)),
        _pointer(rstd, dtype, pixels), _pointer(bias, dtype, channels),
    )  # fmt: skip
    return (z, None) if y is None else (y, z)


def epilogue_backward(
    grad: Tensor,
    kept: Tensor,
    statistics: Statistics,
    filter_sums: Tensor,
    bias: Tensor | None,
    relu: bool,
    factors: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kernelnorm.ops.backends.eager.epilogue_backward`."""
    grad, kept = collapsible(grad), collapsible(kept)
    channels, dtype = kept.shape[1], compute_dtype(kept)
    pixels = kept.numel() // channels
    call = _outputs(kept.dtype, kept.shape, 1, relu, factors, torch.get_num_threads())
    mu, rstd = statistics.mu.contiguous(), statistics.rstd.contiguous()
    filter_sums, bias = filter_sums.contiguous(), _flat(bias, dtype)
    grad_z = writable(torch.empty_like(kept))
    pair = torch.empty((len(kept), 2, *kept.shape[2:]), dtype=dtype, device="cpu")
    vectors = torch.empty((2, channels), dtype=dtype, device="cpu")
    grad_bias, grad_sums = vectors.unbind()
    sums = torch.empty(call.threads * 4 * channels, dtype=torch.float64, device="cpu")
    _kernels().epilogue_backward(
        call, *_large(grad, kept), *_large(kept, kept), *_large(grad_z, kept),
        _pointer(mu, dtype, pixels), _pointer(rstd, dtype, pixels),
        _pointer(filter_sums, dtype, channels), _pointer(bias, dtype, channels), pair.data_ptr(),
        grad_bias.data_ptr(), grad_sums.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return grad_z, pair, grad_bias, grad_sums


def statistics_backward(
    grad: Tensor, x: Tensor, pair: Tensor, keys: Tensor | None, settings: Settings
) -> Tensor:
    """See :func:`kernelnorm.ops.backends.eager.statistics_backward`."""
    grad, x, pair = writable(grad), collapsible(x), pair.contiguous()
    call = _windows(x.dtype, x.shape, settings, torch.get_num_threads())
    windows = 2 * len(x) * prod(_positions(x.shape, settings.geometry))
    scratch = torch.empty(call.threads * call.scratch, dtype=torch.float64, device="cpu")
    _kernels().statistics_backward(
        call, *_large(grad, x), *_large(x, x), _pointer(pair, compute_dtype(x), windows),
        _keys(keys, x.shape), scratch.data_ptr(),
    )  # fmt: skip
    return grad


def _kernels() -> Library:
    kernels = library()
    assert kernels is not None, "supports() is asked first"
    return kernels


def _large(x: Tensor, like: Tensor) -> tuple[int, Strides]:
    """The pointer and the strides of a tensor that has the shape and dtype of another."""
    if x.shape != like.shape or x.dtype != like.dtype or not x.is_cpu:
        raise RuntimeError(
            f"expected a CPU tensor of shape {tuple(like.shape)} and {like.dtype}, "
            f"got shape {tuple(x.shape)} and {x.dtype} on {x.device}"
        )
    return x.data_ptr(), _strides(x.shape, x.stride())


def _pointer(x: Tensor | None, dtype: torch.dtype, count: int) -> int | None:
    """The pointer of a contiguous tensor with that many elements."""
    if x is None:
        return None
    if x.numel() != count or x.dtype != dtype or not (x.is_cpu and x.is_contiguous()):
        raise RuntimeError(
            f"expected {count} contiguous elements of {dtype} on the CPU, got shape "
            f"{tuple(x.shape)}, strides {x.stride()} and {x.dtype} on {x.device}"
        )
    return x.data_ptr()


def _keys(keys: Tensor | None, shape: Sequence[int]) -> int | None:
    return _pointer(keys, torch.int32, count_keys(shape))


def _flat(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


@functools.lru_cache(maxsize=4096)
def _strides(shape: Sequence[int], stride: Sequence[int]) -> Strides:
    strides = strides_of(shape, stride)
    assert strides is not None, "collapsible() or writable() is called first"
    return Strides(*strides)


@functools.lru_cache(maxsize=4096)
def _positions(shape: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    return tuple(geometry.positions(i, size) for i, size in enumerate(shape[2:]))


@functools.lru_cache(maxsize=4096)
def _windows(dtype: torch.dtype, shape: Sequence[int], settings: Settings, threads: int) -> Call:
    """A call over the windows of an input of that shape."""
    geometry, call = settings.geometry, _call(dtype, shape, threads)
    mean, square, kappa, grad_mean, grad_var = constants(settings, shape[1])
    call.groups, call.eps, call.keep_threshold = (
        settings.groups, settings.eps, keep_threshold(settings.p)
    )  # fmt: skip
    call.mean, call.square, call.dropout_variance = mean, square, kappa
    call.sizes = _three(shape[2:])
    call.positions = _three(_positions(shape, geometry))
    call.kernel, call.stride = _three(geometry.kernel_size), _three(geometry.stride)
    call.padding, call.dilation = _three(geometry.padding, 0), _three(geometry.dilation)
    call.scratch = _TILE * (geometry.stride[-1] + 1) + geometry.reach(len(shape) - 3) + 2
    return call


@functools.lru_cache(maxsize=4096)
def _outputs(
    dtype: torch.dtype,
    shape: Sequence[int],
    groups: int,
    relu: bool,
    factors: tuple[float, float],
    threads: int,
) -> Call:
    """A call over outputs of that shape."""
    call = _call(dtype, shape, threads)
    call.groups, call.relu = groups, relu
    call.grad_mean, call.grad_var = factors
    call.positions = _three(shape[2:])
    return call


def _call(dtype: torch.dtype, shape: Sequence[int], threads: int) -> Call:
    most = max(1, prod(shape) // _ELEMENTS_PER_THREAD)
    return Call(
        dtype=_DTYPES[dtype], threads=min(threads, most), dims=len(shape) - 2,
        samples=shape[0], channels=shape[1],
    )  # fmt: skip


def _three(values: Sequence[int], missing: int = 1) -> ctypes.Array[ctypes.c_int64]:
    """Three dimensions, aligned to the right as in kernels.c."""
    return (ctypes.c_int64 * 3)(*[missing] * (3 - len(values)), *values)
