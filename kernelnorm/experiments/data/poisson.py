"""Poisson samples of the images: each image is in each batch with the same probability."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor

from kernelnorm.experiments.data.batches import Augment, seeded_generator
from kernelnorm.experiments.data.images import Images

__all__ = ["PoissonSampling"]


@dataclass(frozen=True, kw_only=True)
class PoissonSampling:
    """Batches that are Poisson samples, drawn by Opacus; some are empty.

    Augmentation is a function of ``(seed, epoch, step)`` and of the size of the parts.

    Args:
        images: what to draw from.
        rate: the probability that a batch contains a given image.
        generator: returns the random generator of a batch, given its epoch and step.
        seed: of the augmentation.
        preprocess: converts ``uint8`` images to the network's input.
        views: the number of times that an image is in its batch, each time augmented anew.
        augment: what to do to each view; default: nothing.
        device: where the batches go; augmentation and preprocessing happen there.
    """

    images: Images
    rate: float
    generator: Callable[[int, int], torch.Generator]
    seed: int
    preprocess: Callable[[Tensor], Tensor]
    views: int = 1
    augment: Augment | None = None
    device: torch.device | str = "cpu"

    def draw(self, epoch: int, step: int) -> Tensor:
        """Return the indices of the images of a batch, in ascending order."""
        sampler = UniformWithReplacementSampler(
            num_samples=len(self.images),
            sample_rate=self.rate,
            generator=self.generator(epoch, step),
            steps=1,
        )
        return torch.tensor(next(iter(sampler)), dtype=torch.int64)

    def parts(
        self, epoch: int, step: int, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Iterate over a batch in parts ``(x, y, last)``; an empty batch is one empty part.

        Args:
            epoch: number of the epoch.
            step: within the epoch.
            most: the most views in a part. All views of an image are in one part, one after the
                other, even if they are more than ``most``. Default: one part.

        Returns:
            an iterator over ``x``, ``float32`` of shape :math:`(B V, C, H, W)` with ``V`` views,
            ``y``, ``int64`` of shape :math:`(B V,)`, and whether the part is the last one.
        """
        index = self.draw(epoch, step)
        parts = index.split(max(1, len(index) if most is None else most // self.views))
        augmentation = seeded_generator("augment", self.seed, epoch, step)
        for number, part in enumerate(parts, 1):
            x, y = (
                t.index_select(0, part).to(self.device).repeat_interleave(self.views, 0)
                for t in (self.images.pixels, self.images.labels)
            )
            if self.augment:
                x = self.augment(x, augmentation)
            yield self.preprocess(x), y, number == len(parts)
