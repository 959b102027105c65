"""The primitives as kernels in C, for CPUs; :mod:`kernelnorm.ops.backends.eager` has the formulas.

Before a kernel runs, its caller here checks shapes, strides and dtypes and allocates the results.
One kernel serves every memory format, since it takes the strides of samples, pixels and channels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from kernelnorm.ops.backends import Statistics, compute_dtype, eager
from kernelnorm.ops.backends.cpu.convolution import convolution, convolution_backward
from kernelnorm.ops.backends.cpu.library import Call, Library, library
from kernelnorm.ops.mask import count_keys, keep_threshold
from kernelnorm.ops.settings import Settings, constants
from kernelnorm.ops.strides import strides_of, with_pixel_stride, without_overlap
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

name = "cpu"
centres_filters = False

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_TILE = 256
"""The pixels that a loop handles at once, as in kernels.c."""

_ELEMENTS_PER_THREAD = 1 << 14
"""Fewer elements take less time than waking another thread."""


def supports(x: Tensor) -> bool:
    """True for non-empty float32, float64 and bfloat16 CPU tensors, if the kernels were built."""
    return x.is_cpu and x.dtype in _DTYPES and x.numel() > 0 and library() is not None


def window_statistics(
    x: Tensor, keys: Tensor | None, settings: Settings, with_means: bool
) -> Statistics:
    """See :func:`kernelnorm.ops.backends.eager.window_statistics`."""
    if with_means and settings.groups > 1:
        return eager.window_statistics(x, keys, settings, with_means)
    x, call = with_pixel_stride(x), _windows(x, settings)
    dtype, shape = compute_dtype(x), (len(x), 1, *_positions(x.shape[2:], settings.geometry))
    mu, rstd = _empty(shape, dtype), _empty(shape, dtype)
    offset = means = None
    if with_means:
        offset, means = _empty(shape, dtype), _empty(shape, dtype)
        call.offset, call.means = offset.data_ptr(), means.data_ptr()
    workspace = _empty((3 * len(x) * prod(x.shape[2:]) + call.threads * call.scratch,))
    call.x, call.keys = _large(x, x), _keys(keys, x.shape)
    call.mu, call.rstd, call.workspace = mu.data_ptr(), rstd.data_ptr(), workspace.data_ptr()
    _kernels().window_statistics(call)
    return Statistics(mu, rstd, offset, means)


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
    z, dtype = without_overlap(z), compute_dtype(z)
    y = torch.empty_like(z) if slope is None else None
    call = _outputs(z, slope)
    terms = [(_flat(map_, dtype), _flat(vector, dtype)) for map_, vector in terms]
    rstd, bias = _flat(rstd, dtype), _bias(bias, z)
    call.x = _large(z, z)
    call.mu, call.sums = _map(terms[0][0], z), _vector(terms[0][1], z)
    if len(terms) > 1:
        call.means, call.rest = _map(terms[1][0], z), _vector(terms[1][1], z)
    if y is not None:
        call.out = _large(y, z)
    call.rstd, call.bias = _map(rstd, z), _vector(bias, z)
    _kernels().epilogue(call)
    return (z, None) if y is None else (y, z)


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
    grad, kept, dtype = with_pixel_stride(grad), with_pixel_stride(kept), compute_dtype(kept)
    call, channels = _outputs(kept, slope), kept.shape[1]
    mu, rstd = _flat(statistics.mu, dtype), _flat(statistics.rstd, dtype)
    filter_sums, bias = _flat(filter_sums, dtype), _bias(bias, kept)
    grad_z = without_overlap(torch.empty_like(kept))
    pair = _empty((len(kept), 2, *kept.shape[2:]), dtype)
    grad_bias, grad_sums = _empty((channels,), dtype), _empty((channels,), dtype)
    workspace = _empty((call.threads * 4 * channels,))
    call.x, call.grad, call.out = _large(kept, kept), _large(grad, kept), _large(grad_z, kept)
    call.mu, call.rstd = _map(mu, kept), _map(rstd, kept)
    call.sums, call.bias = _vector(filter_sums, kept), _vector(bias, kept)
    call.grad_mean, call.grad_var = factors
    call.pair, call.workspace = pair.data_ptr(), workspace.data_ptr()
    call.grad_bias, call.grad_sums = grad_bias.data_ptr(), grad_sums.data_ptr()
    _kernels().epilogue_backward(call)
    return grad_z, pair, grad_bias, grad_sums


def statistics_backward(
    grad: Tensor, x: Tensor, pair: Tensor, keys: Tensor | None, settings: Settings
) -> Tensor:
    """See :func:`kernelnorm.ops.backends.eager.statistics_backward`."""
    grad, x, pair = without_overlap(grad), with_pixel_stride(x), _flat(pair, compute_dtype(x))
    call = _windows(x, settings)
    workspace = _empty((call.threads * call.scratch,))
    call.x, call.grad, call.keys = _large(x, x), _large(grad, x), _keys(keys, x.shape)
    windows = len(x) * prod(_positions(x.shape[2:], settings.geometry))
    call.pair, call.workspace = _pointer(pair, pair.dtype, 2 * windows), workspace.data_ptr()
    _kernels().statistics_backward(call)
    return grad


def _kernels() -> Library:
    kernels = library()
    assert kernels is not None, "supports() is asked first"
    return kernels


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.resolve_neg()  # a view of one element is contiguous, even if negated
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _bias(bias: Tensor | None, z: Tensor) -> Tensor:
    dtype = compute_dtype(z)
    return (
        torch.zeros(z.shape[1], dtype=dtype, device="cpu") if bias is None else _flat(bias, dtype)
    )


def _large(x: Tensor, like: Tensor) -> tuple[int, int, int, int]:
    """The pointer and strides of a tensor, which must have the shape and dtype of ``like``."""
    strides = strides_of(x.shape, x.stride())
    if x.shape != like.shape or x.dtype != like.dtype or not x.is_cpu or strides is None:
        raise RuntimeError(
            f"expected a CPU tensor of shape {tuple(like.shape)} and {like.dtype}, got shape "
            f"{tuple(x.shape)}, strides {x.stride()} and {x.dtype} on {x.device}"
        )
    return _address(x), *strides


def _map(x: Tensor, z: Tensor) -> int:
    return _pointer(x, compute_dtype(z), z.numel() // z.shape[1])


def _vector(x: Tensor, z: Tensor) -> int:
    return _pointer(x, compute_dtype(z), z.shape[1])


def _keys(keys: Tensor | None, shape: Sequence[int]) -> int | None:
    return None if keys is None else _pointer(keys, torch.int32, count_keys(shape))


def _pointer(x: Tensor, dtype: torch.dtype, count: int) -> int:
    """The pointer of a tensor, which must have ``count`` contiguous elements."""
    if x.numel() != count or x.dtype != dtype or not (x.is_cpu and x.is_contiguous()):
        raise RuntimeError(
            f"expected {count} contiguous elements of {dtype} on the CPU, got shape "
            f"{tuple(x.shape)}, strides {x.stride()} and {x.dtype} on {x.device}"
        )
    return _address(x)


def _address(x: Tensor) -> int:
    address = x.data_ptr()
    if not address and x.numel():
        raise RuntimeError(f"expected a tensor with storage, shape {tuple(x.shape)} has none")
    return address


def _windows(x: Tensor, settings: Settings) -> Call:
    """The arguments of a kernel that needs the windows of ``x``."""
    template = _windows_template(x.dtype, x.shape, settings, torch.get_num_threads())
    return Call.from_buffer_copy(template)


def _outputs(z: Tensor, slope: float | None) -> Call:
    """The arguments of a kernel that goes over the outputs ``z``."""
    template = _template(z.dtype, z.shape, torch.get_num_threads())
    call = Call.from_buffer_copy(template)
    call.activation = 0 if slope is None else 2 if slope else 1
    call.slope = slope or 0
    return call


@functools.lru_cache(maxsize=4096)
def _windows_template(
    dtype: torch.dtype, shape: Sequence[int], settings: Settings, threads: int
) -> Call:
    (size, stride, padding, dilation), factors = settings.geometry, constants(settings, shape[1])
    call = Call.from_buffer_copy(_template(dtype, shape, threads))
    call.eps, call.threshold = settings.eps, keep_threshold(settings.p)
    call.mean, call.square = factors.mean, factors.square * (1 + factors.dropout_variance)
    call.sizes = _three(shape[2:])
    call.positions = _three(_positions(shape[2:], settings.geometry))
    call.kernel, call.stride, call.dilation = _three(size), _three(stride), _three(dilation)
    call.padding = _three(padding, missing=0)
    # The pixels that a tile's windows span on a line, or the windows that reach a tile's pixels.
    reach, windows = settings.geometry.reach(-1), call.positions[2]
    pixels = (min(_TILE, windows) - 1) * stride[-1] + reach
    call.scratch = max(pixels, min(windows, (_TILE + reach) // stride[-1] + 2), 1)
    return call


@functools.lru_cache(maxsize=4096)
def _template(dtype: torch.dtype, shape: Sequence[int], threads: int) -> Call:
    """The arguments that depend only on the dtype and shape of a tensor and on the threads."""
    n, channels, *spatial = shape
    most = max(1, prod(shape) // _ELEMENTS_PER_THREAD)
    call = Call(_DTYPES[dtype], min(threads, most), len(spatial), n, channels)
    call.positions = _three(spatial)
    return call


@functools.lru_cache(maxsize=4096)
def _positions(sizes: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    return tuple(geometry.positions(i, size) for i, size in enumerate(sizes))


def _three(values: Sequence[int], missing: int = 1) -> tuple[int, ...]:
    """Three dimensions, aligned to the right as in kernels.c."""
    return (*[missing] * (3 - len(values)), *values)
