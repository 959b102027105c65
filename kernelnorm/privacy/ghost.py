r"""Ghost norms: the norms of the samples' gradients, computed without the gradients.

.. math::
    \|G_i\|^2 = \sum_{k,j} (G_i)_{kj}^2
        = \sum_{t,s} (z_t \cdot z_s) (u_t - \mu_t) \cdot (u_s - \mu_s)

for the gradients :math:`G_i` of :mod:`kernelnorm.privacy.product`. The second sum takes less time
if there are few positions. The products of windows are sums of products of pixels,
:math:`u_t \cdot u_s = \sum_o x_{t+o} \cdot x_{s+o}` over the offsets :math:`o` of a window, so
the windows are not unfolded.

Source: Li et al., `Large language models can be strong differentially private learners
<https://arxiv.org/abs/2110.05679>`_, and for convolutions Bu et al., `Scalable and efficient
training of large convolutional neural networks with differential privacy
<https://arxiv.org/abs/2205.10683>`_.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kernelnorm.ops.backends import compute_dtype
from kernelnorm.ops.backends.eager import accumulate_dtype
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import box_sum
from kernelnorm.privacy.product import Product
from kernelnorm.privacy.standardised import Standardisation

_GHOST = 4
_WEIGHT = 256
"""Time of one operation of a ghost norm, and of writing and reading one element of a sample's
gradient. The unit is one operation of a convolution. Measured on a CPU."""

_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 26
"""Maximum number of elements of an intermediate result; on CPUs it stays in the cache."""


def ghost_is_faster(product: Product, kept: bool) -> bool:
    """True if ghost norms are expected to take less time than the gradients of the samples.

    Args:
        kept: the gradients of the samples would be kept, which saves the convolution that computes
            their weighted sum
    """
    filters, *window = product.filter_shape
    groups, channels = product.settings.groups, product.x.shape[1]
    positions, pixels = prod(product.z.shape[2:]) * product.augmentations, product.pixels
    offsets = prod(product.settings.geometry.kernel_size)
    ghost = pixels**2 * channels + positions**2 * (filters + groups * offsets)
    weights = filters * prod(window)
    return _GHOST * ghost < _WEIGHT * weights + (not kept) * positions * weights


def ghost_norms(product: Product, standardised: Standardisation | None = None) -> list[Tensor]:
    """The squared norms of the samples' gradients, one tensor for each chunk of samples.

    The gradients are those of the filters, or with ``standardised`` those of the weight from which
    the filters are computed.
    """
    most = _CHUNK.get(product.x.device.type, _CHUNK_ELSEWHERE)
    samples = max(1, most // max(1, product.pixels**2))
    return [_ghost(chunk, standardised) for chunk in product.chunks(samples)]


def _ghost(product: Product, standardised: Standardisation | None) -> Tensor:
    r"""The squared norms of the samples by products of positions, shape :math:`(n,)`.

    Computed in float64 (on MPS in float32), since the terms cancel for windows whose mean is large
    compared with their standard deviation, and for windows with large gradients and hardly any
    variance.
    """
    x, z, settings, mu, _, augmentations = product
    groups, dtype = settings.groups, accumulate_dtype(x)
    x, z = x.to(dtype), z.to(dtype)
    if standardised is not None:
        z = z * standardised.scale.to(dtype).view(1, -1, *[1] * (z.dim() - 2))
    of_filters = _as_positions(z, augmentations).flatten(2).unflatten(1, (groups, -1))
    of_gradients = of_filters.mT @ of_filters
    windows = _window_products(_as_positions(x, augmentations), settings)
    norms = (windows * of_gradients).flatten(1).sum(1)
    elements = prod(product.filter_shape[1:])
    if mu is not None or standardised is not None:
        sums = box_sum(x.unflatten(1, (groups, -1)).sum(2), settings.geometry)
        # To subtract the mean of a filter's gradient, subtract the mean of each window.
        mu = sums / elements if mu is None else mu.to(dtype)
        mu, sums = (_as_positions(t, augmentations).flatten(2) for t in (mu, sums))
        through = (of_gradients @ mu.unsqueeze(3)).squeeze(3)
        norms = norms + ((elements * mu - 2 * sums) * through).flatten(1).sum(1)
    if standardised is not None:
        norms = norms - _along_filters(x, z, settings, standardised, augmentations)
    result: Tensor = norms.clamp_min(0).to(compute_dtype(product.z))
    return result


def _along_filters(
    x: Tensor, z: Tensor, settings: Settings, standardised: Standardisation, augmentations: int
) -> Tensor:
    """The part of the squared norms along the filters, shape :math:`(n,)`.

    It is the last term of the squared norm in :mod:`kernelnorm.privacy.standardised`.
    """
    filters = standardised.filters.to(x.dtype)
    _, stride, padding, dilation = settings.geometry
    options = stride, padding, dilation, False, (0,) * len(stride), settings.groups
    y = torch.convolution(x, filters, None, *options)
    along = (z * y).flatten(2).sum(2).unflatten(0, (-1, augmentations)).sum(1)
    filters = filters.flatten(1)
    n = filters.shape[1]
    factors = (2 - filters.square().sum(1) / n) / n
    result: Tensor = along.square() @ factors
    return result


def _window_products(x: Tensor, settings: Settings) -> Tensor:
    """The dot products of all pairs of windows of a sample.

    Shape:
        - x: :math:`(n, C, A, *)`, with ``A`` augmentations
        - Output: :math:`(n, G, A P, A P)`
    """
    geometry, d = settings.geometry, x.dim() - 2
    flat = x.flatten(2).unflatten(1, (settings.groups, -1))
    products: Tensor = flat.mT @ flat
    if geometry.pointwise:
        return products
    products = products.unflatten(3, x.shape[2:]).unflatten(2, x.shape[2:])
    for i, size in enumerate(x.shape[3:]):
        count, stride = geometry.positions(i, size), geometry.stride[i]
        shape = list(products.shape)
        shape[3 + i] = shape[3 + d + i] = count
        total = products.new_zeros(shape)
        for k in range(geometry.kernel_size[i]):
            # Window t has pixel t * stride + start at offset k, if that is not in the padding.
            start = k * geometry.dilation[i] - geometry.padding[i]
            first = max(0, -(start // stride))
            last = min(count - 1, (size - 1 - start) // stride)
            if first <= last:
                windows = slice(first, last + 1)
                pixels = slice(first * stride + start, last * stride + start + 1, stride)
                total[_both(windows, i, d)] += products[_both(pixels, i, d)]
        products = total
    return products.flatten(2, 1 + d).flatten(3)


def _both(chosen: slice, i: int, d: int) -> tuple[slice, ...]:
    """The index of spatial dimension ``i`` of both windows or pixels of a product."""
    every = (slice(None),)
    return (*every * (3 + i), chosen, *every * (d - 1), chosen)


def _as_positions(rows: Tensor, augmentations: int) -> Tensor:
    """From shape :math:`(N A, C, *)` to :math:`(N, C, A, *)`, with ``A`` augmentations."""
    result: Tensor = rows.unflatten(0, (-1, augmentations)).transpose(1, 2)
    return result
