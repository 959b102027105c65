"""The primitives in PyTorch operations: every device and dtype, and differentiable.

Exporters and functional transforms use this backend, too, and the tests compare the other backends
with it.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelnorm.ops.backends import Statistics, compute_dtype
from kernelnorm.ops.mask import expand_keys, keep
from kernelnorm.ops.observers import sizes
from kernelnorm.ops.settings import Settings, constants
from kernelnorm.ops.windows import box_sum, box_sum_transpose

name = "eager"
centres_filters = True

_SAFE_VARIANCE = 1e-2
r"""The smallest dropout variance :math:`\kappa` for which the variance is computed in float32:
:math:`|\mu| \, \text{rstd}` is below :math:`\kappa^{-1/2}`, so the difference
:math:`\text{mean}(u^2) - \mu^2` keeps its digits. Not on CUDA: there a convolution of float32 may
round to TF32, which has 3 digits."""


def supports(x: Tensor) -> bool:
    """See :meth:`kernelnorm.ops.backends.Backend.supports`."""
    return True


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over windows: float64, which costs little for maps, except on MPS."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def window_statistics(
    x: Tensor, keys: Tensor | None, settings: Settings, with_means: bool
) -> Statistics:
    r"""Mean and inverse standard deviation of the windows after dropout.

    .. math::
        \mu = \text{mean}(u') \qquad
        \text{rstd} = (\text{var}(u') + \kappa (\text{var}(u') + \mu^2) + \epsilon)^{-1/2}

    Args:
        keys: the drawn keys of the mask; ``None`` for no mask
        with_means: also return the plain means of the windows, and the differences between
            :math:`\mu` and them
    """
    geometry, dtype = settings.geometry, compute_dtype(x)
    factors = constants(settings, sizes(x)[1])
    if keys is None and factors.dropout_variance >= _SAFE_VARIANCE and not x.is_cuda:
        x = x.to(dtype)
        mean, square = x.mean(1, keepdim=True), x.square().mean(1, keepdim=True)
    else:
        mean, square = _pixel_moments(x, keys, settings.p)
    factor = factors.square * (1 + factors.dropout_variance)
    mu = box_sum(mean, geometry, factors.mean)
    var = box_sum(square, geometry, factor, settings.eps) - mu.square()
    if factors.dropout_variance < _SAFE_VARIANCE:
        # Clamps the value but not the gradient: rounding can make a variance of zero negative.
        var = var + (var.clamp_min(settings.eps) - var).detach()
    rstd = var.pow(-0.5).to(dtype)  # exported as one node, rsqrt as two
    if not with_means:
        return Statistics(mu.to(dtype), rstd)
    means = window_means(x, settings)
    return Statistics(mu.to(dtype), rstd, (mu - means).to(dtype), means.to(dtype))


def window_means(x: Tensor, settings: Settings) -> Tensor:
    """The plain mean of each window and group, in :func:`accumulate_dtype`: :math:`(N, G, *)`."""
    grouped = x.unflatten(1, (settings.groups, -1))
    means = grouped.mean(2, dtype=compute_dtype(x)).to(accumulate_dtype(x))
    return box_sum(means, settings.geometry, 1 / prod(settings.geometry.kernel_size))


def _pixel_moments(x: Tensor, keys: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    r"""Mean and mean square over the channels of each pixel, after the mask of zeros and ones.

    Sums the differences to the pixel's first channel, and adds this channel afterwards in
    :func:`accumulate_dtype`: no digits are lost where the mean is large beside the deviation. A
    first channel that the mask drops counts as zero: it may be far from the channels that are kept.
    """
    x = x.to(compute_dtype(x))
    mask = None if keys is None else keep(expand_keys(keys, x.shape, p), x.dtype)
    first = x[:, :1] if mask is None else x[:, :1] * mask[:, :1]
    difference = x - first if mask is None else (x - first) * mask
    first = first.to(accumulate_dtype(x))
    shift = first if mask is None else first * mask.mean(1, keepdim=True).to(first.dtype)
    mean = difference.mean(1, keepdim=True).to(first.dtype)
    square = difference.square().mean(1, keepdim=True).to(first.dtype)
    return mean + shift, square + (2 * mean + shift) * first


def convolution(x: Tensor, filters: Tensor, settings: Settings) -> Tensor:
    """The convolution without bias."""
    return torch.convolution(x, filters, None, *_options(settings))


def epilogue(
    z: Tensor,
    terms: list[tuple[Tensor, Tensor]],
    rstd: Tensor,
    bias: Tensor | None,
    slope: float | None,
) -> tuple[Tensor, Tensor | None]:
    r"""The output from the convolution :math:`z`, and the numerator if there is no activation.

    .. math::
        \text{numerator}_k = z_k - \sum_i \text{map}_i \text{vector}_{i,k} \qquad
        y_k = \text{act}(\text{numerator}_k \, \text{rstd} + b_k)

    Args:
        z: may be overwritten by other backends
        terms: pairs of a map and a vector; a map may have a channel for each group

    Shape:
        - z, y, numerator: :math:`(N, K, *)`
    """
    numerator = z
    for map_, vector in terms:
        groups = sizes(map_)[1]
        if groups > 1:
            map_ = map_.repeat_interleave(sizes(z)[1] // groups, 1)
        numerator = numerator - map_ * _as_channels(vector, z)
    y = numerator * rstd
    if bias is not None:
        y = y + _as_channels(bias, z).to(rstd.dtype)
    if slope is not None:
        y = F.leaky_relu(y, slope) if slope else y.relu()
    return y.to(z.dtype), numerator.to(z.dtype) if slope is None else None


def epilogue_backward(
    grad: Tensor,
    kept: Tensor,
    statistics: Statistics,
    filter_sums: Tensor,
    bias: Tensor | None,
    slope: float | None,
    factors: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The gradient of the convolution's result, and the sums over it.

    With :math:`g` the gradient before the activation:

    .. math::
        \text{grad\_z} = g \, \text{rstd} \quad
        \text{grad\_var} = -\frac12 \text{rstd}^3 \sum_k g_k \, \text{numerator}_k \quad
        \text{grad\_mu} = -\text{rstd} \sum_k g_k S_k - 2 \mu \, \text{grad\_var}

    Args:
        kept: the numerator; with an activation the output :math:`y` instead, from which the
            numerator follows wherever :math:`g` is not zero
        factors: the factors of ``grad_mu`` and ``grad_var`` in ``pair``

    Returns:
        ``grad_z``; ``pair``, ``grad_mu`` and ``grad_var`` times the factors, shape
        :math:`(N, 2, *)`; ``grad_bias``, :math:`\sum g_k`; ``grad_sums``,
        :math:`\sum g_k \, \text{rstd} \, \mu`, to be subtracted from the gradient of each
        weight.
    """
    mu, rstd = statistics.mu, statistics.rstd
    if slope is not None:
        grad = torch.where(kept <= 0, grad * slope if slope else 0, grad)
    g, kept = grad.to(rstd.dtype), kept.to(rstd.dtype)
    scaled = g * rstd
    if slope:
        kept = torch.where(kept < 0, kept / slope, kept)
    if slope is not None and bias is not None:
        kept = kept - _as_channels(bias, kept).to(rstd.dtype)
    product = (scaled * kept).sum(1, keepdim=True)  # y without bias is numerator times rstd
    grad_var = -0.5 * rstd * (product * rstd if slope is None else product)
    grad_mu = -(scaled * _as_channels(filter_sums, kept)).sum(1, keepdim=True) - 2 * mu * grad_var
    pair = torch.cat([grad_mu * factors[0], grad_var * factors[1]], 1)
    grad_z = scaled.to(grad.dtype)
    others = [0, *range(2, grad.dim())]
    # The last sum is over the rounded grad_z, as is the gradient of the filters.
    return grad_z, pair, g.sum(others), (grad_z * mu).sum(others)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    filters: Tensor,
    mu: Tensor,
    grad_sums: Tensor,
    settings: Settings,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    r"""The gradients of the input, :math:`\text{grad} \star W`, and of the filters.

    .. math:: \text{grad\_W}_k = \sum_u \text{grad}_k (u - \mu)

    Args:
        needs: whether the gradients of the input and of the filters are wanted

    Returns:
        The gradient of the input, which the caller may overwrite, and that of the filters in
        :func:`compute_dtype`.
    """
    grad_x, grad_filters, _ = torch.ops.aten.convolution_backward.default(
        grad, x, filters, None, *_options(settings), (*needs, False)
    )
    if grad_filters is not None:
        sums = grad_sums.view(-1, *[1] * (filters.dim() - 1))
        grad_filters = grad_filters.to(grad_sums.dtype).sub_(sums)
    return grad_x, grad_filters


def statistics_backward(
    grad: Tensor, x: Tensor, pair: Tensor, keys: Tensor | None, settings: Settings
) -> Tensor:
    r"""Add the gradient that comes through the statistics to the convolution's gradient.

    .. math:: \text{grad} + m (a + b x)

    with :math:`a` and :math:`b` the sums of ``pair`` over the windows that contain the pixel, and
    :math:`m` the mask of zeros and ones.

    Shape:
        - grad, x, Output: :math:`(N, C, *)`
        - pair: :math:`(N, 2, *)`
    """
    a, b = box_sum_transpose(pair, settings.geometry, x.shape[2:]).split(1, 1)
    through = a + b * x
    if keys is not None:
        through = through * keep(expand_keys(keys, x.shape, settings.p), through.dtype)
    total: Tensor = grad + through
    return total.to(x.dtype)


def _options(settings: Settings) -> tuple[Any, ...]:
    """The arguments of a convolution after its tensors."""
    _, stride, padding, dilation = settings.geometry
    return stride, padding, dilation, False, (0,) * len(stride), settings.groups


def _as_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 2))
