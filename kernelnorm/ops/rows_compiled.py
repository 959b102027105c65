"""The row primitives of :mod:`kernelnorm.ops.rows_torch` as one compiled loop each, for CPUs.

Run one by one, the operations of a primitive read and write the large tensors several times; as a
region of ``torch.compile`` they are read once. A region is compiled when it is first used, in a few
seconds, for all sizes; PyTorch keeps it on disk. That takes a C++ compiler.

The regions see tensors in one of the two :mod:`kernelnorm.ops.layouts`; anything else is left to
``rows_torch``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernelnorm.ops import rows_torch
from kernelnorm.ops.layouts import Layout, flat, flat_map, layout_of, unflat
from kernelnorm.ops.mask import Keys

# The elements below which calling a region takes longer than running its operations one by one.
_LEAST = 1 << 13
_LEAST_OF_MOMENTS = 1 << 15
_LEAST_OF_EPILOGUE = 1 << 16

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
        and _works()
    )


def statistics(x: Tensor, keys: Keys | None) -> Tensor:
    """See :func:`kernelnorm.ops.rows_torch.statistics`."""
    layout = layout_of(x)
    if layout is None:
        return rows_torch.statistics(x, keys)
    pair: Tensor = _region(rows_torch.statistics)(
        flat(x.detach(), layout), _flat_keys(keys, layout)
    )
    return pair.view(2, len(x), 1, *x.shape[2:])


def moments(
    sums: Tensor, factors: tuple[float, float], kappa: float, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`kernelnorm.ops.rows_torch.moments`."""
    if sums.numel() < _LEAST_OF_MOMENTS:
        return rows_torch.moments(sums, factors, kappa, eps, dtype)
    shape = sums.shape[1:]
    mu, r = _region(rows_torch.moments)(sums.reshape(2, -1), factors, kappa, eps, dtype)
    return mu.view(shape), r.view(shape)


def epilogue(
    z: Tensor, maps: list[Tensor], vectors: list[Tensor], r: Tensor, bias: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor | None]:
    """See :func:`kernelnorm.ops.rows_torch.epilogue`."""
    layout = layout_of(z)
    small = z.numel() < _LEAST_OF_EPILOGUE
    if layout is None or small or any(m.shape[1] > 1 for m in maps):
        return rows_torch.epilogue(z, maps, vectors, r, bias, relu)
    maps = [flat_map(m, layout) for m in maps]
    bias = None if bias is None else bias.detach()
    y = _region(_epilogue)(flat(z, layout), maps, vectors, flat_map(r, layout), bias, relu)
    return (z, None) if relu else (unflat(y, z.shape, layout), z)


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
    layout = layout_of(kept)
    if layout is None:
        return rows_torch.output_gradient(grad, kept, r, mu, sums, bias, relu, factors)
    if layout_of(grad) != layout:
        grad = torch.empty_like(kept).copy_(grad)
    shape = r.shape
    r, mu = flat_map(r, layout), flat_map(mu, layout)
    bias = None if bias is None else bias.detach()
    rows, pair = _region(_output_gradient)(
        flat(grad.detach(), layout), flat(kept.detach(), layout), r, mu, sums, bias, relu, factors
    )
    if layout == "rows":
        grad_bias, grad_sums = (r.reciprocal().T @ rows)[0], -(mu.T @ rows)[0]
    else:
        grad_bias = (rows @ r.reciprocal().movedim(1, 2)).sum((0, 2))
        grad_sums = -(rows @ mu.movedim(1, 2)).sum((0, 2))
    return unflat(rows, kept.shape, layout), pair.view(2, *shape), grad_bias, grad_sums


def input_gradient(grad: Tensor, x: Tensor, pair: Tensor, keys: Keys | None) -> Tensor:
    """See :func:`kernelnorm.ops.rows_torch.input_gradient`."""
    layout = layout_of(x)
    if layout is None or layout_of(grad) != layout:
        return rows_torch.input_gradient(grad, x, pair, keys)
    pair = pair.reshape(2, -1, 1) if layout == "rows" else pair.flatten(3)
    _region(_input_gradient)(
        flat(grad.detach(), layout), flat(x.detach(), layout), pair, _flat_keys(keys, layout)
    )
    return grad


@functools.cache
def _works() -> bool:
    """Tries it once."""
    try:
        _region(rows_torch.statistics)(torch.ones(2, 3), None)
    except Exception as error:  # whatever is wrong with the compiler, there is another way
        _log.warning("compiling failed, so kernel normalisation is slower: %s", error)
        return False
    return True


@functools.cache
def _region(function: Callable[..., Any]) -> Callable[..., Any]:
    """Not at import: the compiler takes a second to load.

    The arguments are to be tensors that need no gradient, and no parameters: for those, PyTorch
    compiles again for each size.
    """
    return torch.compile(function, dynamic=True, options={"size_asserts": False})


def _epilogue(
    z: Tensor, maps: list[Tensor], vectors: list[Tensor], r: Tensor, bias: Tensor | None, relu: bool
) -> Tensor:
    """Leaves in ``z`` what is to be kept."""
    y, numerator = rows_torch.epilogue(z, maps, vectors, r, bias, relu)
    z.copy_(y if numerator is None else numerator)
    return y


def _output_gradient(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Without the sums over the pixels: those are products of a matrix and a vector."""
    return rows_torch.output_gradient(*arguments)[:2]


def _input_gradient(grad: Tensor, x: Tensor, pair: Tensor, keys: Keys | None) -> None:
    grad.copy_(rows_torch.input_gradient(grad, x, pair, keys))


def _flat_keys(keys: Keys | None, layout: Layout) -> Keys | None:
    if keys is None:
        return None
    channels = keys.channels.flatten() if layout == "rows" else keys.channels.view(-1, 1)
    return keys._replace(pixels=flat_map(keys.pixels, layout), channels=channels)
