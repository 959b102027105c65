"""The row primitives of :mod:`kernelnorm.ops.rows_torch` as compiled loops, for CPUs.

Run one by one, the operations of a primitive read and write the large tensors several times, and
calling them takes longer than the small ones take themselves; compiled, they are a loop or two.
That is done when a primitive is first used, in a few seconds each, for all sizes; PyTorch keeps it
on disk. It takes a C++ compiler.
There are loops for each layout of :mod:`kernelnorm.ops.layouts`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelnorm.ops import pointwise, rows_torch, statistics
from kernelnorm.ops.layouts import Layout, in_rows, is_rows, layout_of
from kernelnorm.ops.mask import count_keys, rounded_p
from kernelnorm.ops.regions import compile_for_all_sizes, once
from kernelnorm.ops.windows import Geometry

# The elements below which compiling is not worth its seconds.
_LEAST = 1 << 9

# The channels below which a loop is over the pixels of a line, with no inner one.
_FEW = 8

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
    x: Tensor,
    weight: Tensor,
    keys: Tensor | None,
    p: float,
    geometry: Geometry,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kernelnorm.ops.statistics.window_statistics`."""
    if sum(geometry.kernel_size) > _MOST_TAPS:
        return statistics.window_statistics(rows_torch, x, weight, keys, p, geometry, eps, dtype)
    layout = layout_of(x) or "planes"
    copied = layout == "slices" and not pointwise.pays(x, weight, geometry)
    compiled = _window_statistics(
        layout, copied, _few(x), x.dtype, keys is not None, rounded_p(p), geometry, eps, dtype
    )
    x = _laid(x, layout)
    mu, r, sums, *others = compiled([x, _by_filter(weight)[1], *_given(keys)])
    return mu, r, sums, others[0] if copied else x


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
    layout = layout_of(z)
    of_into = None if into is None else layout_of(into)
    apart = into is None or (of_into is not None and layout != "slices")
    if layout is None or len(maps) > 1 or not apart:
        return rows_torch.epilogue(z, maps, vectors, r, bias, relu, into)
    compiled = _epilogue(layout, of_into, z.dim() - 2, z.dtype, bias is not None, relu)
    others = *_given(bias), *(() if into is None else (into,))
    y = compiled([z, *maps, *vectors, r, *others])
    if into is not None:
        return into, None if relu else z
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
    layout = layout_of(kept) or "planes"
    if layout == "slices" and grad.stride() != kept.stride():
        layout = "rows"
    compiled = _output_gradient(layout, kept.dim() - 2, kept.dtype, bias is not None, relu)
    large = _laid(grad, layout), _laid(kept, layout)
    small = r, mu, sums, _vector(factors, r.dtype), *_given(bias)
    grad_z, pair, grad_bias, grad_sums, *_ = compiled([*large, *small])
    return grad_z, pair, grad_bias, grad_sums


def through_statistics(
    grad: Tensor | None,
    grad_weight: Tensor | None,
    x: Tensor,
    pair: Tensor,
    grad_sums: Tensor,
    keys: Tensor | None,
    p: float,
    geometry: Geometry,
    total: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`kernelnorm.ops.statistics.through_statistics`."""
    of_total = None if total is None else layout_of(total)
    if (
        grad is None
        or sum(geometry.kernel_size) > _MOST_TAPS
        or of_total == "planes"
        or (total is not None and of_total is None)
    ):
        return statistics.through_statistics(
            rows_torch, grad, grad_weight, x, pair, grad_sums, keys, p, geometry, total
        )
    layout = layout_of(x) or "planes"
    compiled = _through_statistics(
        layout, of_total, _few(x), x.dtype, keys is not None, rounded_p(p), geometry
    )
    grad = _laid(grad, _layout_of_gradient(layout))
    filters = pair.new_empty(0, 0, dtype=grad_sums.dtype)
    if grad_weight is not None:
        grad_weight, filters = _by_filter(grad_weight)
    others = *_given(keys), *(() if total is None else (total,))
    compiled([grad, _laid(x, layout), pair, filters, grad_sums[: filters.shape[0]], *others])
    return (grad if total is None else total), grad_weight


@functools.cache
def _window_statistics(
    layout: Layout,
    copied: bool,
    few: int,
    dtype: torch.dtype,
    masked: bool,
    p: float,
    geometry: Geometry,
    eps: float,
    of_maps: torch.dtype,
) -> Any:
    x, keys, filters, _ = _inputs_like(layout, dtype, geometry, few)

    def function(x: Tensor, filters: Tensor, *others: Tensor) -> Any:
        if few:
            torch._check(x.shape[1] == few)
        copies = [once(_copy_in_rows(x))] if copied else []
        of_mask = others[0] if masked else None
        mu, r, sums, _ = statistics.window_statistics(
            rows_torch, x, filters, of_mask, p, geometry, eps, of_maps
        )
        return mu, r, sums, *copies

    return _compiled(function, (x, filters, *[keys] * masked))


@functools.cache
def _epilogue(
    layout: Layout, of_into: Layout | None, d: int, dtype: torch.dtype, biased: bool, relu: bool
) -> Any:
    z, one, vector = _outputs_like(layout, dtype, d)

    def function(z: Tensor, mu: Tensor, sums: Tensor, r: Tensor, *others: Tensor) -> Any:
        """Leaves in ``z`` what is to be kept, unless that is the output and has its own place."""
        bias = others[0] if biased else None
        y, numerator = rows_torch.epilogue(z, [mu], [sums], r, bias, relu)
        if numerator is not None:
            z.copy_(numerator)
        if of_into or relu:
            (others[-1] if of_into else z).copy_(y)
            return ()
        return (y,)

    places = [] if of_into is None else [_dense(tuple(z.shape), of_into, dtype)]
    return _compiled(function, (z, one, vector, one, *[vector] * biased, *places))


@functools.cache
def _output_gradient(layout: Layout, d: int, dtype: torch.dtype, biased: bool, relu: bool) -> Any:
    z, one, vector = _outputs_like(layout, dtype, d)

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
            grad, kept, r, mu, sums, bias, relu, (factors[0], factors[1])
        )
        once(_copy_in_rows(grad_z) if layout == "slices" else grad_z)
        return grad_z, pair, *(_over_pixels(grad_z, m, layout) for m in (r.reciprocal(), mu))

    factors = vector.new_empty(2)
    arguments = z, z, one, one, vector, factors, *[vector] * biased
    return _compiled(function, arguments)


def _copy_in_rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def _over_pixels(z: Tensor, one: Tensor, layout: Layout) -> Tensor:
    """The sum of ``z`` times a map: a vector."""
    if layout == "planes":
        return (z * one).sum([0, *range(2, z.dim())])
    # Over a line at a time: it is in the cache, and its channels' sums are all that is kept of it.
    lines = once((z * one).movedim(1, -1).sum(-2))
    return lines.flatten(0, -2).sum(0)


@functools.cache
def _through_statistics(
    layout: Layout,
    of_total: Layout | None,
    few: int,
    dtype: torch.dtype,
    masked: bool,
    p: float,
    geometry: Geometry,
) -> Any:
    x, keys, filters, pair = _inputs_like(layout, dtype, geometry, few)
    grad_sums = filters.new_empty(len(filters))

    def function(
        grad: Tensor, x: Tensor, pair: Tensor, filters: Tensor, grad_sums: Tensor, *others: Tensor
    ) -> Any:
        if few:
            torch._check(x.shape[1] == few)
        of_mask = others[0] if masked else None
        total = others[-1] if of_total else None
        result, _ = statistics.through_statistics(
            rows_torch, grad, filters, x, pair, grad_sums, of_mask, p, geometry, total
        )
        if total is None and result is not None:
            grad.copy_(result)
        return ()

    totals = [] if of_total is None else [_dense(tuple(x.shape), of_total, dtype)]
    grad = _dense(tuple(x.shape), _layout_of_gradient(layout), dtype)
    return _compiled(function, (grad, x, pair, filters, grad_sums, *[keys] * masked, *totals))


def _layout_of_gradient(layout: Layout) -> Layout:
    """That of a convolution's gradient of an input in that layout."""
    return "rows" if layout == "slices" else layout


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
_SAMPLES, _CHANNELS, _SIZES, _FILTERS, _LONGER = 13, 67, (29, 31, 23), (71, 103), 89


def _inputs_like(
    layout: Layout, dtype: torch.dtype, geometry: Geometry, few: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An input, the keys of its mask, filters, and a pair of maps."""
    channels = few or _CHANNELS
    taken = {2, _SAMPLES, channels, *_FILTERS, _LONGER}
    sizes: list[int] = []
    positions: list[int] = []
    for i, stride in enumerate(geometry.stride):
        size = geometry.reach(i) + 10 * stride
        while {size, geometry.positions(i, size)} & taken:
            size += 1
        sizes.append(size)
        positions.append(geometry.positions(i, size))
        taken |= {sizes[i], positions[i]}
    x = _dense((_SAMPLES, channels, *sizes), layout, dtype)
    keys = x.new_zeros(count_keys(x.shape), dtype=torch.int32)  # leaves the generator alone
    return x, keys, x.new_empty(_FILTERS), x.new_empty(2, _SAMPLES, 1, *positions)


def _outputs_like(layout: Layout, dtype: torch.dtype, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """An output, a map and a vector."""
    z = _dense((_SAMPLES, _CHANNELS, *_SIZES[:d]), layout, dtype)
    return z, z.new_empty(_SAMPLES, 1, *_SIZES[:d]), z.new_empty(_CHANNELS)


def _dense(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> Tensor:
    if layout == "slices":
        longer = _dense((shape[0], _LONGER, *shape[2:]), "rows", dtype)
        return longer[:, : shape[1]]
    return _laid(torch.empty(shape, dtype=dtype, device="cpu"), layout)


def _few(x: Tensor) -> int:
    """The channels where they are fewer than a vector register's; otherwise 0, for any number."""
    return x.shape[1] if x.shape[1] < _FEW else 0


def _laid(x: Tensor, layout: Layout) -> Tensor:
    """The tensor in that layout, a copy if need be; those of slices are."""
    if layout == "planes":
        return x.contiguous()
    return x if layout == "slices" else in_rows(x)


def _by_filter(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight, a copy if need be, and a view of it in which each filter is a line."""
    if not (weight.is_contiguous() or is_rows(weight)):
        weight = weight.contiguous()
    filters = weight.shape[0]
    n = weight.numel() // filters
    return weight, weight.as_strided((filters, n), (n, 1))


@functools.lru_cache(maxsize=1024)
def _vector(numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def _given(vector: Tensor | None) -> tuple[Tensor, ...]:
    return () if vector is None else (vector if vector.is_contiguous() else vector.contiguous(),)
