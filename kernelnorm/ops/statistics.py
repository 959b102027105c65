"""The statistics of windows, and the gradient through them, from row primitives and box filters.

Each backend has its own row primitives, and these two are made of them.
"""

from __future__ import annotations

from math import prod
from types import ModuleType

import torch
from torch import Tensor

from kernelnorm.ops.mask import Keys, kappa, rounded_p, spread_keys
from kernelnorm.ops.rows_torch import narrow
from kernelnorm.ops.windows import Geometry, box_sum, box_sum_transpose


def window_statistics(
    rows: ModuleType,
    x: Tensor,
    weight: Tensor,
    keys: Tensor | None,
    p: float,
    geometry: Geometry,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Mean and inverse deviation of the windows, after dropout, and the sums of the filters.

    .. math::
        \mu = \text{mean}(u') \qquad r = (\text{var}(u') + \epsilon)^{-1/2} \qquad
        S_k = \sum W_k

    Args:
        rows: the backend
        keys: of the dropout mask; ``None`` is for the statistics that masks give on average
        dtype: of the maps

    Returns:
        :math:`\mu`, :math:`r`, :math:`S`, and the input: itself, or a copy that a convolution reads
        faster.
    """
    kept, kappa = _dropout(x.shape[1], keys is not None, p, geometry)
    pixels = prod(geometry.kernel_size)
    factors = 1 / (kept * pixels), 1 / (kept**2 * pixels)
    pair = box_sum(rows.statistics(x, mask_of(x, keys, p)), geometry)
    mu, r = rows.moments(pair, factors, kappa, eps, dtype)
    return mu, r, filter_sums(weight, narrow(x)), x


def gradient_factors(
    channels: int, masked: bool, p: float, geometry: Geometry
) -> tuple[float, float]:
    """What takes the gradients of a window's mean and variance to its elements' share of them."""
    kept, kappa = _dropout(channels, masked, p, geometry)
    elements = channels * prod(geometry.kernel_size)
    return 1 / (kept * elements), 2 * (1 + kappa) / (kept**2 * elements)


def through_statistics(
    rows: ModuleType,
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
    """Adds what comes through the statistics to the convolution's gradients.

    Args:
        rows: the backend
        grad: the convolution's gradient of the input, if that is wanted; may be overwritten
        grad_weight: the convolution's gradient of the weight, if that is wanted; may be overwritten
        pair: the gradients of the windows' mean and variance, times :func:`gradient_factors`
        grad_sums: what is subtracted from the gradient of each weight of a filter
        total: what the input's gradient is added to, in place
    """
    if grad is not None:
        pair = box_sum_transpose(pair, geometry, x.shape[2:])
        grad = rows.input_gradient(grad, x, pair, mask_of(x, keys, p))
        if total is not None:
            grad = total.add_(grad)
    if grad_weight is not None:
        grad_weight = grad_weight.to(grad_sums.dtype).sub_(as_filters(grad_sums, grad_weight))
    return grad, grad_weight


def filter_sums(filters: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of each filter: a vector."""
    return filters.sum(tuple(range(1, filters.dim())), dtype=dtype)


def as_filters(vector: Tensor, like: Tensor) -> Tensor:
    """A vector with one entry for each filter, as it is added to filters."""
    return vector.view(-1, *[1] * (like.dim() - 1))


def mask_of(x: Tensor, keys: Tensor | None, p: float) -> Keys | None:
    """The mask of an input, as row primitives take it."""
    return None if keys is None else spread_keys(keys, x.shape, p)


def _dropout(channels: int, masked: bool, p: float, geometry: Geometry) -> tuple[float, float]:
    """The part of the elements that the mask keeps, and kappa where there is no mask."""
    if masked:
        return 1 - rounded_p(p), 0.0
    return 1.0, kappa(p, channels * prod(geometry.kernel_size))
