r"""Gradients of convolutions for each sample: whole, as norms, and as a weighted sum.

The gradient that sample :math:`i` gives to the filters is a product of its output gradients and its
windows, :math:`G_i = \sum_t z_t (u_t - \mu_t)^\top` over the positions :math:`t`; :math:`\mu` is
zero for ordinary convolutions. With groups, each has its channels of the windows and its filters,
and :math:`\mu_t` is that of all channels. There are two ways to its norm:

.. math::
    \|G_i\|^2 = \sum_{k,j} (G_i)_{kj}^2
        = \sum_{t,s} (z_t \cdot z_s) (u_t - \mu_t) \cdot (u_s - \mu_s)

The second, the *ghost norm*, forms no gradient. It takes less time where positions are few. The
products of windows are sums of products of pixels, :math:`u_t \cdot u_s = \sum_o x_{t+o} \cdot
x_{s+o}` over the offsets :math:`o` of a window, so windows need not be unfolded for it.

If a sample has several augmentations, each is a row of the batch, and :math:`t` and :math:`s` run
over the positions of all of them.

Source: the ghost norm is that of Li et al., `Large language models can be strong differentially
private learners <https://arxiv.org/abs/2110.05679>`_, for convolutions that of Bu et al., `Scalable
and efficient training of large convolutional neural networks with differential privacy
<https://arxiv.org/abs/2205.10683>`_; one backward pass that keeps both factors, `Differentially
private optimization on large model at small cost <https://arxiv.org/abs/2210.00038>`_.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kernelnorm.ops.backends import backend_for, compute_dtype
from kernelnorm.ops.backends.eager import accumulate_dtype
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry, box_sum

_KEPT = 4
"""Largest size of the kept gradients of all samples, in sizes of the input and the output."""

_GHOST = 4
_WEIGHT = 256
"""Time of an operation of a ghost norm, and of writing and reading one weight of a sample's
gradient, in operations of a convolution. Measured on a CPU."""

_SAMPLES = 8
"""Samples whose gradients are formed at a time. The convolutions of single ones take longer."""

_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 26
"""Elements of intermediate results that are formed at a time: on CPUs they stay in the cache."""


Back = Callable[[Tensor], Tensor]
"""From gradients of filters, one of each sample, to those of a weight that the filters are computed
from: linear in them."""


class Product(NamedTuple):
    r"""The gradient of a convolution's filters, before its sum over samples and positions.

    Args:
        x: the input, shape :math:`(N, C, *)`
        z: the gradient of the convolution's output, shape :math:`(N, K, *)`
        settings: of the convolution
        mu: what is subtracted from each window, shape :math:`(N, 1, *)`, or ``None``
        sums: with ``mu``, the sum of :math:`z_t \mu_t` over the positions, shape :math:`(N, K)`
        augmentations: consecutive rows of the batch that make a sample
    """

    x: Tensor
    z: Tensor
    settings: Settings
    mu: Tensor | None = None
    sums: Tensor | None = None
    augmentations: int = 1

    @property
    def samples(self) -> int:
        """The number of samples."""
        return len(self.x) // self.augmentations

    @property
    def filter_shape(self) -> tuple[int, ...]:
        """The shape of the filters."""
        channels = self.x.shape[1] // self.settings.groups
        return self.z.shape[1], channels, *self.settings.geometry.kernel_size

    def chunks(self, size: int) -> Iterator[Product]:
        """The same of ``size`` samples at a time."""
        for start in range(0, len(self.x), size * self.augmentations):
            rows = slice(start, start + size * self.augmentations)
            mu, sums = (None if t is None else t[rows] for t in (self.mu, self.sums))
            yield self._replace(x=self.x[rows], z=self.z[rows], mu=mu, sums=sums)


def unnormalised(geometry: Geometry, groups: int) -> Settings:
    """The settings of a convolution without a norm."""
    return Settings(geometry, groups, 0.0, False, 1.0, None)


def per_sample(product: Product) -> Tensor:
    """The gradient of the filters for each sample, shape :math:`(N, K, C / groups, *)`."""
    dtype = compute_dtype(product.z)
    result = product.z.new_empty((product.samples, *product.filter_shape), dtype=dtype)
    for part, gradients in zip(result.split(_SAMPLES), _per_sample(product), strict=False):
        part.copy_(gradients)
    return result


def squared_norms(product: Product, back: Back | None = None) -> Tensor:
    """The squared norm of the filters' gradient for each sample, shape :math:`(N,)`.

    With ``back``, of the gradient of the weight that the filters are computed from.
    """
    if back is None and ghost_is_faster(product, kept=False):
        most = _CHUNK.get(product.x.device.type, _CHUNK_ELSEWHERE)
        samples = max(1, most // max(1, _pixels(product) ** 2))
        norms = [_ghost(chunk) for chunk in product.chunks(samples)]
    else:
        formed = _per_sample(product)
        norms = [squares(gradients if back is None else back(gradients)) for gradients in formed]
    return torch.cat(norms) if norms else product.z.new_zeros(0, dtype=compute_dtype(product.z))


def weighted_sum(product: Product, weights: Tensor) -> Tensor:
    """The sum of the samples' gradients of the filters, each times its weight."""
    x, z, settings, mu, sums, augmentations = product
    weights = weights.repeat_interleave(augmentations)
    z = z * weights.to(z.dtype).view(-1, *[1] * (z.dim() - 1))
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


def ghost_is_faster(product: Product, kept: bool) -> bool:
    """True if ghost norms are expected to take less time than the gradients of the samples.

    Args:
        kept: the gradients are kept, and save the convolution that forms their weighted sum
    """
    filters, *window = product.filter_shape
    groups, channels = product.settings.groups, product.x.shape[1]
    positions, pixels = prod(product.z.shape[2:]) * product.augmentations, _pixels(product)
    offsets = prod(product.settings.geometry.kernel_size)
    ghost = pixels**2 * channels + positions**2 * (filters + groups * offsets)
    weights = filters * prod(window)
    return _GHOST * ghost < _WEIGHT * weights + (not kept) * positions * weights


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
    """The squared norm of each sample's part."""
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return norms.square()


def _per_sample(product: Product) -> Iterator[Tensor]:
    """The gradients of some samples at a time, by a convolution with a group for each."""
    dtype, shape = compute_dtype(product.z), product.filter_shape
    for chunk in product.chunks(_SAMPLES):
        x, z, settings, mu, sums, augmentations = chunk
        n = chunk.samples
        x, z = (_samples_as_groups(t.to(dtype), augmentations) for t in (x, z))
        if sums is not None:
            sums = of_samples(sums, augmentations).flatten()
        settings = settings._replace(groups=n * settings.groups)
        filters = z.new_empty(z.shape[1], *shape[1:])
        yield _convolved(x, z, mu, sums, settings, filters).view(n, *shape)


def _samples_as_groups(rows: Tensor, augmentations: int) -> Tensor:
    """From shape :math:`(N A, C, *)` to :math:`(A, N C, *)`, with ``A`` augmentations."""
    groups: Tensor = rows.unflatten(0, (-1, augmentations)).transpose(0, 1)
    return groups.reshape(augmentations, -1, *rows.shape[2:])


def _as_positions(rows: Tensor, augmentations: int) -> Tensor:
    """From shape :math:`(N A, C, *)` to :math:`(N, C, A, *)`, with ``A`` augmentations."""
    result: Tensor = rows.unflatten(0, (-1, augmentations)).transpose(1, 2)
    return result


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
        sums: of the products of ``z`` and ``mu``, for each filter
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


def _ghost(product: Product) -> Tensor:
    r"""The squared norms of the samples by products of positions, shape :math:`(n,)`.

    In float64, as the terms cancel: where windows have a large mean beside their deviation, and
    where some have large gradients and hardly any variance.
    """
    x, z, settings, mu, _, augmentations = product
    groups, dtype = settings.groups, accumulate_dtype(x)
    z = _as_positions(z.to(dtype), augmentations).flatten(2).unflatten(1, (groups, -1))
    of_gradients = z.mT @ z
    x = x.to(dtype)
    windows = _window_products(_as_positions(x, augmentations), settings)
    norms = (windows * of_gradients).flatten(1).sum(1)
    if mu is not None:
        mu = _as_positions(mu.to(dtype), augmentations).flatten(2)
        sums = box_sum(x.unflatten(1, (groups, -1)).sum(2), settings.geometry)
        sums = _as_positions(sums, augmentations).flatten(2)
        through = (of_gradients @ mu.mT.unsqueeze(1)).squeeze(3)
        elements = prod(product.filter_shape[1:])
        norms = norms + ((elements * mu - 2 * sums) * through).flatten(1).sum(1)
    result: Tensor = norms.clamp_min(0).to(compute_dtype(product.z))
    return result


def _window_products(x: Tensor, settings: Settings) -> Tensor:
    """The products of each two windows of a sample.

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


def _pixels(product: Product) -> int:
    """The pixels of a sample."""
    return product.augmentations * prod(product.x.shape[2:])
