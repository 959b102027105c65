"""Convolutions and their gradients, as products of matrices where that is what they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelnorm.ops.layouts import flat, layout_of, unflat
from kernelnorm.ops.windows import Geometry


def convolve(x: Tensor, filters: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """The convolution of ``torch.nn.functional``, without a bias."""
    if _is_product(x, geometry, groups):
        z = flat(x, "rows") @ filters.flatten(1).T
        return unflat(z, (len(x), len(filters), *x.shape[2:]), "rows")
    return torch.convolution(x, filters, None, *_arguments(geometry, groups))


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    filters: Tensor,
    geometry: Geometry,
    groups: int,
    needs_x: bool,
    needs_filters: bool,
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and of the filters, ``None`` where they are not needed.

    Args:
        into: where the gradient of the input is added, in the place of a new tensor
    """
    if _is_product(x, geometry, groups) and layout_of(grad) == "rows":
        g, w = flat(grad, "rows"), filters.flatten(1)
        grad_x = grad_filters = None
        if needs_x and into is not None:
            flat(into, "rows").addmm_(g, w)
            grad_x = into
        elif needs_x:
            grad_x = unflat(g @ w, x.shape, "rows")
        if needs_filters:
            grad_filters = (g.T @ flat(x, "rows")).view_as(filters)
        return grad_x, grad_filters
    needs = needs_x, needs_filters, False
    grad_x, grad_filters, _ = torch.ops.aten.convolution_backward(
        grad, x, filters, None, *_arguments(geometry, groups), needs
    )
    if grad_x is not None and into is not None:
        grad_x = into.add_(grad_x)
    return grad_x, grad_filters


def _is_product(x: Tensor, geometry: Geometry, groups: int) -> bool:
    """Whether it is a product with the rows of ``x``, which BLAS reads where they lie.

    A convolution would copy rows that are a part of longer ones. What is traced stays one.
    """
    return (
        geometry.pointwise
        and groups == 1
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and layout_of(x) == "rows"
    )


def _arguments(geometry: Geometry, groups: int) -> tuple[Any, ...]:
    _, stride, padding, dilation = geometry
    return stride, padding, dilation, False, (0,) * len(stride), groups
