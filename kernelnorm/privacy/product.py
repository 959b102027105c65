r"""The gradient of a convolution's filters for each sample, as two factors.

The gradient that sample :math:`i` gives to the filters is a product of its output gradients and its
windows, :math:`G_i = \sum_t z_t (u_t - \mu_t)^\top` over the positions :math:`t`; :math:`\mu` is
zero for ordinary convolutions. With groups, each group has its own filters and its own channels of
the windows, and all groups share :math:`\mu_t`. If a sample has several augmentations, each is a
row of the batch, and :math:`t` runs over the positions of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from torch import Tensor

from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry


class Product(NamedTuple):
    r"""The gradient of a convolution's filters, before its sum over samples and positions.

    Args:
        x: the input, shape :math:`(N, C, *)`
        z: the gradient of the convolution's output, shape :math:`(N, K, *)`
        settings: the settings of the convolution
        mu: what is subtracted from each window, shape :math:`(N, 1, *)`, or ``None``
        sums: with ``mu``, the sum of :math:`z_t \mu_t` over the positions, shape :math:`(N, K)`
        augmentations: the number of consecutive rows of the batch that make a sample
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
        """The shape of the filters, :math:`(K, C / groups, *)`."""
        channels = self.x.shape[1] // self.settings.groups
        return self.z.shape[1], channels, *self.settings.geometry.kernel_size

    @property
    def pixels(self) -> int:
        """The number of input pixels of a sample, over all of its augmentations."""
        return self.augmentations * prod(self.x.shape[2:])

    def chunks(self, size: int) -> Iterator[Product]:
        """Yield the product of ``size`` samples at a time."""
        for start in range(0, len(self.x), size * self.augmentations):
            rows = slice(start, start + size * self.augmentations)
            mu, sums = (None if t is None else t[rows] for t in (self.mu, self.sums))
            yield self._replace(x=self.x[rows], z=self.z[rows], mu=mu, sums=sums)


def unnormalised(geometry: Geometry, groups: int) -> Settings:
    """The settings of a convolution without a norm."""
    return Settings(geometry, groups, 0.0, False, 1.0, None)
