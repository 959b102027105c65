"""Gradients of convolutions for each sample: the gradients, their norms, and a weighted sum.

They are computed from a :class:`~kernelnorm.privacy.product.Product`: one backward pass gives both
of its factors.

Source: Bu et al., `Differentially private optimization on large model at small cost
<https://arxiv.org/abs/2210.00038>`_.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from kernelnorm.ops.backends import backend_for, compute_dtype
from kernelnorm.ops.backends.eager import accumulate_dtype
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import box_sum
from kernelnorm.privacy.ghost import ghost_is_faster, ghost_norms
from kernelnorm.privacy.product import Product
from kernelnorm.privacy.standardised import Standardisation

_KEPT = 4
"""The gradients of the samples are kept up to this multiple of the size of input and output."""

_ROUNDING = 8
"""A factor of the bound in :func:`_rounding`. The errors that were found are below 0.2."""

_SAMPLES = 8
"""Number of samples whose gradients one convolution computes; one at a time takes longer."""


def per_sample(product: Product, standardised: Standardisation | None = None) -> Tensor:
    """The gradient of the weight for each sample, shape :math:`(N, K, C / groups, *)`."""
    dtype = compute_dtype(product.z)
    result = product.z.new_empty((product.samples, *product.filter_shape), dtype=dtype)
    formed = _per_sample(product, standardised)
    for part, gradients in zip(result.split(_SAMPLES), formed, strict=False):
        part.copy_(gradients)
    return result


def squared_norms(product: Product, standardised: Standardisation | None = None) -> Tensor:
    """The squared norm of the weight's gradient for each sample, shape :math:`(N,)`.

    The norm includes a bound on what rounding adds to the sample in :func:`weighted_sum`, so that
    its share of the sum is never larger than its norm says.
    """
    if ghost_is_faster(product, kept=False):
        norms = ghost_norms(product, standardised)
    else:
        norms = [squares(gradients) for gradients in _per_sample(product, standardised)]
    if not norms:
        return product.z.new_zeros(0, dtype=compute_dtype(product.z))
    return (torch.cat(norms).sqrt() + _rounding(product, standardised)).square()


def _rounding(product: Product, standardised: Standardisation | None) -> Tensor:
    r"""A bound on the norm of the rounding errors of each sample's gradient, shape :math:`(N,)`.

    .. math::
        \text{ROUNDING} \cdot \text{eps} \sum_t \|z_t\| \|u_t\|

    The gradient itself can be much smaller: for windows with hardly any variance :math:`z_t` is
    large, and the terms :math:`z_t (u_t - \mu_t)^\top` cancel.
    """
    x, z, settings, _, _, augmentations = product
    dtype, groups = compute_dtype(z), settings.groups
    if standardised is not None:
        z = z * standardised.scale.view(1, -1, *[1] * (z.dim() - 2))
    of_z, of_x = (
        torch.linalg.vector_norm(t.unflatten(1, (groups, -1)), dim=2, dtype=dtype) for t in (z, x)
    )
    of_windows = box_sum(of_x.square(), settings.geometry).sqrt()
    bound = _ROUNDING * torch.finfo(dtype).eps * (of_z * of_windows).flatten(1).sum(1)
    return of_samples(bound, augmentations)


def weighted_sum(product: Product, weights: Tensor) -> Tensor:
    """The sum of the samples' gradients of the filters, each times the weight of its sample.

    Computed in the dtype of the norms: in a lower precision, rounding could make the gradient of a
    sample larger than its norm.
    """
    x, z, settings, mu, sums, augmentations = product
    dtype = compute_dtype(z)
    weights = weights.repeat_interleave(augmentations).to(z.device, dtype)
    z = z.to(dtype) * weights.view(-1, *[1] * (z.dim() - 1))
    if settings.geometry.pointwise and x.dim() == 3 and settings.groups == 1 and mu is None:
        total: Tensor = torch.tensordot(z, x.to(z.dtype), dims=([0, 2], [0, 2]))
        return total.unsqueeze(2)
    sums = None if sums is None else weights.to(sums.dtype) @ sums
    filters = z.new_empty(product.filter_shape)
    return _convolved(x.to(z.dtype), z, mu, sums, settings, filters)


def is_kept(product: Product) -> bool:
    """True if the gradients of the samples are worth keeping until their weights are known."""
    if ghost_is_faster(product, kept=True):
        return False
    size = product.samples * prod(product.filter_shape)
    return size <= _KEPT * (product.x.numel() + product.z.numel())


def per_filter(z: Tensor, maps: Tensor) -> Tensor:
    """The sum over positions of ``z`` times each of ``M`` maps.

    Shape:
        - z: :math:`(N, K, *)`, maps: :math:`(N, M, *)`
        - Output: :math:`(N, K, M)`
    """
    return torch.bmm(z.flatten(2).to(maps.dtype), maps.flatten(2).mT)


def of_samples(rows: Tensor, augmentations: int) -> Tensor:
    """The sum over the rows of each sample.

    Shape:
        - rows: :math:`(N A, *)`, with ``A`` augmentations
        - Output: :math:`(N, *)`
    """
    result: Tensor = rows.unflatten(0, (-1, augmentations)).sum(1)
    return result


def squares(gradients: Tensor) -> Tensor:
    """The squared norm of each sample's gradient, from shape :math:`(N, *)` to :math:`(N,)`.

    Those of the filters are added up in float64: in float32 a sum of many equal squares would be
    too small.
    """
    if gradients.dim() > 2:
        gradients = torch.linalg.vector_norm(gradients.flatten(2), dim=2)
    squared = gradients.to(accumulate_dtype(gradients)).square()
    return squared.sum(1).to(gradients.dtype)


def _per_sample(product: Product, standardised: Standardisation | None) -> Iterator[Tensor]:
    """The gradients of some samples at a time, by a convolution with groups for each sample."""
    dtype, shape = compute_dtype(product.z), product.filter_shape
    for chunk in product.chunks(_SAMPLES):
        x, z, settings, mu, sums, augmentations = chunk
        n = chunk.samples
        x, z = (_samples_as_groups(t.to(dtype), augmentations) for t in (x, z))
        if sums is not None:
            sums = of_samples(sums, augmentations).flatten()
        settings = settings._replace(groups=n * settings.groups)
        filters = z.new_empty(z.shape[1], *shape[1:])
        formed = _convolved(x, z, mu, sums, settings, filters).view(n, *shape)
        yield formed if standardised is None else standardised.back_(formed)


def _samples_as_groups(rows: Tensor, augmentations: int) -> Tensor:
    """From shape :math:`(N A, C, *)` to :math:`(A, N C, *)`, with ``A`` augmentations."""
    groups: Tensor = rows.unflatten(0, (-1, augmentations)).transpose(0, 1)
    return groups.reshape(augmentations, -1, *rows.shape[2:])


def _convolved(
    x: Tensor,
    z: Tensor,
    mu: Tensor | None,
    sums: Tensor | None,
    settings: Settings,
    filters: Tensor,
) -> Tensor:
    """The gradient of filters by a convolution of the whole batch.

    Args:
        sums: the sum of the products of ``z`` and ``mu`` for each filter, shape :math:`(K,)`
    """
    if mu is None:
        mu = z.new_zeros((len(z), 1, *z.shape[2:]), dtype=compute_dtype(z))
    if sums is None:
        sums = mu.new_zeros(len(filters))
    _, gradient = backend_for(z).convolution_backward(
        z, x, filters, mu, sums, settings, (False, True)
    )
    assert gradient is not None
    return gradient
