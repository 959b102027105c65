"""The row primitives of :mod:`kernelnorm.ops.rows_torch` as compiled loops, for CPUs.

Run one by one, the operations of a primitive read and write the large tensors several times, and
calling them takes longer than the small ones take themselves; compiled, they are a loop or two.
That is done when a primitive is first used, in a few seconds each, for all sizes; PyTorch keeps it
on disk. It takes a C++ compiler.

The loops are for tensors in one of two layouts: *rows*, in which the channels of a pixel lie side
by side, as in ``channels_last``, and *planes*, in which the pixels of a channel do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kernelnorm.ops import rows_torch, statistics
from kernelnorm.ops.mask import count_keys, rounded_p
from kernelnorm.ops.regions import compile_for_all_sizes
from kernelnorm.ops.windows import Geometry, box_sum_transpose

Layout = Literal["rows", "planes"]

# The elements below which compiling is not worth its seconds.
_LEAST = 1 << 12

# The window's sides, added up, above which compiling its sums would take minutes.
_MOST_TAPS = 16

_log = logging.getLogger(__name__)


def supports(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor on a CPU, of a size and dtype that compiling is for."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() >= _LEAST
    )


def window_statistics(
    x: Tensor, keys: Tensor | None, p: float, geometry: Geometry, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`kernelnorm.ops.statistics.window_statistics`."""
    if sum(geometry.kernel_size) > _MOST_TAPS:
        return statistics.window_statistics(rows_torch, x, keys, p, geometry, eps, dtype)
    layout = _layout_of(x) or "planes"
    compiled = _window_statistics(
        layout, x.dtype, keys is not None, rounded_p(p), geometry, eps, dtype
    )
    mu, r = compiled([_laid(x, layout), *_given(keys)])
    return mu, r


def epilogue(
    z: Tensor, maps: list[Tensor], vectors: list[Tensor], r: Tensor, bias: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor | None]:
    """See :func:`kernelnorm.ops.rows_torch.epilogue`."""
    layout = _layout_of(z)
    if layout is None or len(maps) > 1:
        return rows_torch.epilogue(z, maps, vectors, r, bias, relu)
    compiled = _epilogue(layout, z.dim() - 2, z.dtype, bias is not None, relu)
    y = compiled([z, *maps, *vectors, r, *_given(bias)])
    return (z, None) if relu else (y[0], z)


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
    layout = _layout_of(kept) or "planes"
    compiled = _output_gradient(layout, kept.dim() - 2, kept.dtype, bias is not None, relu)
    large = _laid(grad, layout), _laid(kept, layout)
    small = r, mu, sums, _vector(factors, r.dtype), *_given(bias)
    grad_z, pair, inverse = compiled([*large, *small])
    # Sums over the pixels are products of a matrix and a vector: BLAS reads at full speed.
    if layout == "rows":
        transposed = grad_z.movedim(1, -1).flatten(0, -2).T
        grad_bias, grad_sums = transposed.mv(inverse.view(-1)), transposed.mv(mu.view(-1))
    else:
        planes = grad_z.flatten(2)
        grad_bias = (planes @ inverse.flatten(2).movedim(1, 2)).sum((0, 2))
        grad_sums = (planes @ mu.flatten(2).movedim(1, 2)).sum((0, 2))
    return grad_z, pair, grad_bias, grad_sums


def through_statistics(
    grad: Tensor, x: Tensor, pair: Tensor, keys: Tensor | None, p: float, geometry: Geometry
) -> Tensor:
    """See :func:`kernelnorm.ops.statistics.through_statistics`."""
    if sum(geometry.kernel_size) > _MOST_TAPS:
        return statistics.through_statistics(rows_torch, grad, x, pair, keys, p, geometry)
    layout = _layout_of(x) or "planes"
    compiled = _through_statistics(layout, x.dtype, keys is not None, rounded_p(p), geometry)
    grad = _laid(grad, layout)
    compiled([grad, _laid(x, layout), pair, *_given(keys)])
    return grad


@functools.cache
def _window_statistics(
    layout: Layout,
    dtype: torch.dtype,
    masked: bool,
    p: float,
    geometry: Geometry,
    eps: float,
    of_maps: torch.dtype,
) -> Any:
    x, keys = _input_like(layout, dtype, geometry)

    def function(x: Tensor, *others: Tensor) -> Any:
        of_mask = others[0] if masked else None
        return statistics.window_statistics(rows_torch, x, of_mask, p, geometry, eps, of_maps)

    return _compiled(function, (x, keys) if masked else (x,))


@functools.cache
def _epilogue(layout: Layout, d: int, dtype: torch.dtype, biased: bool, relu: bool) -> Any:
    z, one, vector = _output_like(layout, dtype, d)

    def function(z: Tensor, mu: Tensor, sums: Tensor, r: Tensor, *others: Tensor) -> Any:
        """Leaves in ``z`` what is to be kept."""
        bias = others[0] if biased else None
        y, numerator = rows_torch.epilogue(z, [mu], [sums], r, bias, relu)
        z.copy_(y if numerator is None else numerator)
        return () if relu else (y,)

    return _compiled(function, (z, one, vector, one, *[vector] * biased))


@functools.cache
def _output_gradient(layout: Layout, d: int, dtype: torch.dtype, biased: bool, relu: bool) -> Any:
    z, one, vector = _output_like(layout, dtype, d)

    def function(
        grad: Tensor,
        kept: Tensor,
        r: Tensor,
        mu: Tensor,
        sums: Tensor,
        factors: Tensor,
        *others: Tensor,
    ) -> Any:
        bias = others[0] if biased else None
        grad_z, pair, *_ = rows_torch.output_gradient(
            grad, kept, r, mu, sums, bias, relu, (1.0, 1.0)
        )
        return grad_z, pair * factors.view(2, *[1] * r.dim()), r.reciprocal()

    factors = vector.new_empty(2)
    arguments = z, z, one, one, vector, factors, *[vector] * biased
    return _compiled(function, arguments)


@functools.cache
def _through_statistics(
    layout: Layout, dtype: torch.dtype, masked: bool, p: float, geometry: Geometry
) -> Any:
    x, keys = _input_like(layout, dtype, geometry)
    positions = [geometry.positions(i, size) for i, size in enumerate(x.shape[2:])]
    pair = x.new_empty(2, len(x), 1, *positions)

    def function(grad: Tensor, x: Tensor, pair: Tensor, *others: Tensor) -> Any:
        pair = box_sum_transpose(pair, geometry, x.shape[2:])
        mask = statistics.mask_of(x, others[0] if masked else None, p)
        grad.copy_(rows_torch.input_gradient(grad, x, pair, mask))
        return (pair,)  # a result is kept in memory, and not computed anew for each channel

    return _compiled(function, (x, x, pair, *[keys] * masked))


def _compiled(function: Callable[..., Any], examples: Sequence[Tensor]) -> Any:
    """The function as loops, or as it is where they cannot be compiled."""
    try:
        return compile_for_all_sizes(function, examples)
    except Exception as error:  # whatever is wrong with the compiler, there is another way
        _tell(str(error))
        return lambda tensors: function(*tensors)


@functools.cache
def _tell(problem: str) -> None:
    """Once, as the same is likely to be wrong for all."""
    _log.warning("compiling failed, so kernel normalisation is slower: %s", problem)


# In a trace, sizes that are equal are the same size for ever: those of examples must differ.
_SAMPLES, _CHANNELS, _SIZES = 3, 67, (29, 31, 23)


def _input_like(layout: Layout, dtype: torch.dtype, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """An input, and the keys of its mask."""
    taken = {2, _SAMPLES, _CHANNELS}
    sizes: list[int] = []
    for i, stride in enumerate(geometry.stride):
        size = geometry.reach(i) + 10 * stride
        while {size, geometry.positions(i, size)} & taken:
            size += 1
        sizes.append(size)
        taken |= {size, geometry.positions(i, size)}
    x = _dense((_SAMPLES, _CHANNELS, *sizes), layout, dtype)
    return x, x.new_zeros(count_keys(x.shape), dtype=torch.int32)  # leaves the generator alone


def _output_like(layout: Layout, dtype: torch.dtype, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """An output, a map and a vector."""
    z = _dense((_SAMPLES, _CHANNELS, *_SIZES[:d]), layout, dtype)
    return z, z.new_empty(_SAMPLES, 1, *_SIZES[:d]), z.new_empty(_CHANNELS)


def _dense(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> Tensor:
    return _laid(torch.empty(shape, dtype=dtype, device="cpu"), layout)


def _layout_of(x: Tensor) -> Layout | None:
    """That of a tensor of shape :math:`(N, C, *)`; ``None`` for any other."""
    if x.movedim(1, -1).is_contiguous():
        return "rows"
    return "planes" if x.is_contiguous() else None


def _laid(x: Tensor, layout: Layout) -> Tensor:
    """The tensor in that layout, a copy if need be."""
    if layout == "planes":
        return x.contiguous()
    rows = x.movedim(1, -1)
    return x if rows.is_contiguous() else rows.contiguous().movedim(-1, 1)


@functools.lru_cache(maxsize=1024)
def _vector(numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor.contiguous(),)
