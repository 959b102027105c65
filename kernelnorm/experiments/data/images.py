"""Labelled images of one size, as ``uint8``: the form that every dataset is loaded into."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FINGERPRINTED = 256 << 20  # bytes of pixels at most, which take a quarter of a second


@dataclass(frozen=True)
class Images:
    """Labelled images of one size.

    Args:
        pixels: ``uint8`` of shape :math:`(N, C, H, W)`; may be a file mapped into memory.
        labels: ``int64`` of shape :math:`(N,)`, indices into ``classes``.
        classes: the names of the classes.
        split: how the images were divided into training and test images, if kernelnorm did that.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    split: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, n: int) -> Images:
        """The first images of every class, ``n`` in all: class counts differ by 1 at most.

        Where a class has too few images, the others fill its place. The choice does not depend on
        any seed, and the images keep their order.
        """
        if not 0 <= n <= len(self):
            raise ValueError(f"subset: n must be between 0 and {len(self)}, got {n}")
        chosen = balanced(self.labels, n)
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])

    def fingerprint(self, *, whole: bool = False) -> str:
        """A hash of the pixels and labels, in their order; the files' place does not matter.

        Args:
            whole: hash every image. Otherwise, if the pixels have more than 256 MiB, only every
                k-th image is hashed.
        """
        step = 1 if whole else -(-self.pixels.numel() // FINGERPRINTED) or 1
        digest = hashlib.blake2b(str((*self.pixels.shape, step)).encode(), digest_size=8)
        digest.update(self.labels.numpy().tobytes())
        for image in self.pixels[::step]:
            digest.update(image.contiguous().numpy().data)
        return digest.hexdigest()


def balanced(labels: Tensor, n: int) -> Tensor:
    """The indices of the first labels of each class, ``n`` in all, in ascending order."""
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    place_in_class = torch.arange(len(labels)) - starts[labels[by_class]]
    return by_class[place_in_class.argsort(stable=True)[:n]].sort().values
