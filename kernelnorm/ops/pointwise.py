"""Convolutions of single pixels as products of matrices, where they see a part of longer rows.

A dense block's layers see prefixes of one buffer. A convolution wants its channels side by side,
and so a copy of them, forward and backward; a product of matrices reads them where they lie.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelnorm.ops.layouts import is_rows
from kernelnorm.ops.windows import Geometry


def pays(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether products are the faster way: on a CPU with AVX2.

    There they are as fast as convolutions. With AVX-512 a convolution took half of their time, its
    copy included.
    """
    return (
        not is_rows(x)
        and x.stride(1) == 1
        and x.is_cpu
        and geometry.pointwise
        and weight.shape[1] == x.shape[1]
        and _products_are_fast()
    )


@functools.cache
def _products_are_fast() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def convolution(x: Tensor, filters: Tensor) -> Tensor:
    """The product of each pixel and each filter, with the strides of ``channels_last``."""
    return F.linear(x.movedim(1, -1), filters.flatten(1)).movedim(-1, 1)


def convolution_backward(
    grad: Tensor, x: Tensor, filters: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and of the filters, where they are needed."""
    rows, grad_x, grad_filters = grad.movedim(1, -1), None, None
    if needs[0]:
        grad_x = (rows @ filters.flatten(1)).movedim(-1, 1)
    if needs[1]:
        product = rows.flatten(0, -2).t() @ x.movedim(1, -1).flatten(0, -2)
        grad_filters = product.view_as(filters)
    return grad_x, grad_filters
