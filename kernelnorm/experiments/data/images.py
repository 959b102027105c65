"""What every data set becomes: labelled images of one size, as bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class DataError(Exception):
    """Data is missing, broken or does not fit; the message says which, and what to do next."""


@dataclass(frozen=True)
class Images:
    """Labelled images of one size.

    Args:
        pixels: ``uint8`` of shape :math:`(N, C, H, W)`; may be a file mapped into memory.
        labels: ``int64`` of shape :math:`(N,)`, indices into ``classes``.
        classes: the names of the classes.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, n: int) -> Images:
        """The first images of every class, ``n`` in all: class counts differ by 1 at most.

        Where a class has too few images, the others fill its place. The choice does not depend on
        any seed, and the images keep their order.
        """
        if not 0 <= n <= len(self):
            raise ValueError(f"subset: n must be between 0 and {len(self)}, got {n}")
        by_class = self.labels.argsort(stable=True)
        counts = self.labels.bincount(minlength=len(self.classes))
        starts = counts.cumsum(0) - counts
        place_in_class = torch.arange(len(self)) - starts[self.labels[by_class]]
        chosen = by_class[place_in_class.argsort(stable=True)[:n]].sort().values
        return Images(self.pixels[chosen], self.labels[chosen], self.classes)
