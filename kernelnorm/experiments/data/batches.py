"""Batches on the device: order, augmentation, preprocessing, all functions of seed and step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelnorm.experiments.data.images import Images
from kernelnorm.experiments.errors import DataError


@dataclass(frozen=True)
class Preprocess:
    r"""Bytes to ``float32``: :math:`x / 255`, then :math:`(x - mean) / std` for each channel.

    Args:
        mean: of each channel, on the scale 0 to 1. Default: ``None``, only divide by 255.
        std: the standard deviation, likewise; give both or neither.

    Examples::

        >>> Preprocess()(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8))
        tensor([[[[0.0000, 0.2000, 1.0000]]]])
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.mean or ()) != len(self.std or ()) or not all(s > 0 for s in self.std or ()):
            raise ValueError(
                "mean and std must have one number per channel, and std must be above 0; "
                f"got mean={self.mean}, std={self.std}"
            )

    @classmethod
    def fixed(cls, images: Images) -> Preprocess:
        """The preprocessing with mean 0.5 and deviation 0.25, which reveals nothing of ``images``.

        Only their number of channels is used.
        """
        channels = images.pixels.shape[1]
        return cls((0.5,) * channels, (0.25,) * channels)

    @classmethod
    def standardise(cls, images: Images) -> Preprocess:
        """The preprocessing that standardises with the mean and standard deviation of ``images``.

        Raises:
            DataError: if all pixels of a channel are equal, so that its deviation is 0.
        """
        channels = images.pixels.shape[1]
        total = torch.zeros(channels, dtype=torch.float64)
        squares = torch.zeros(channels, dtype=torch.float64)
        for part in images.pixels.split(128):
            x = part.double()
            total += x.sum((0, 2, 3))
            squares += x.square_().sum((0, 2, 3))
        mean = total * channels / images.pixels.numel()
        std = (squares * channels / images.pixels.numel() - mean.square()).sqrt()
        for channel in range(channels):
            if not std[channel] > 0:
                raise DataError(
                    f"channel {channel} of the images is {mean[channel]:.0f} in every pixel and "
                    "cannot be standardised: replace the images, or train without standardising"
                )
        return cls(tuple((mean / 255).tolist()), tuple((std / 255).tolist()))

    def __call__(self, pixels: Tensor) -> Tensor:
        """``uint8`` of shape :math:`(N, C, H, W)` to ``float32`` of the same shape and layout."""
        x = pixels.to(torch.float32, copy=True).div_(255)
        if self.mean and self.std:
            mean, std = (
                torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std)
            )
            x = x.sub_(mean).div_(std)
        return x


@dataclass(frozen=True)
class Augment:
    r"""Random crop and horizontal flip, drawn for each image.

    The paper says "randomly cropped and horizontally flipped with probability of 0.5" and leaves
    the crop open. Here the image is padded by its reflection, by an eighth of its height and width
    on each side, and cropped to its own size at a random place. Zero padding would give black
    borders, whose windows have no variance.

    Args:
        crop: whether to crop.
        flip: whether to flip, with probability 0.5.
    """

    crop: bool = True
    flip: bool = True

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch on its device.

        Args:
            pixels: of shape :math:`(N, C, H, W)`, any type.
            generator: of the random numbers. A generator on the CPU gives the same on any device.

        Returns:
            A new tensor of the same shape.
        """
        n, channels, height, width = pixels.shape

        def draw(low: int, high: int) -> Tensor:
            draws = torch.randint(
                low, high + 1, (n, 1), generator=generator, device=generator.device
            )
            return draws.to(pixels.device, non_blocking=True)

        rows = torch.arange(height, device=pixels.device).expand(n, -1)
        columns = torch.arange(width, device=pixels.device).expand(n, -1)
        if self.crop:
            rows = _reflect(rows + draw(-(height // 8), height // 8), height)
            columns = _reflect(columns + draw(-(width // 8), width // 8), width)
        if self.flip:
            columns = torch.where(draw(0, 1) == 1, columns.flip(1), columns)
        index = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, height * width)
        return pixels.flatten(2).gather(2, index.expand(-1, channels, -1)).view(pixels.shape)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices reflected into the range of ``size`` elements; the end elements are not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def steps_per_epoch(
    n_images: int, batch_size: int, *, train: bool, rank: int = 0, world_size: int = 1
) -> int:
    """The number of batches that :func:`batches` yields for an epoch, from ``start_step`` 0."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and world_size - 1, got {rank} of {world_size}")
    if not train:
        return math.ceil(len(range(rank, n_images, world_size)) / batch_size)
    full, rest = divmod(n_images // world_size, batch_size)
    return full + (rest > 1)


def batches(
    images: Images,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    epoch: int = 0,
    start_step: int = 0,
    augment: Augment | None = None,
    preprocess: Preprocess = Preprocess(),
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over one epoch, in batches ``(x, y)`` that are ready for the network.

    In training the order is a function of ``(seed, epoch)`` and the augmentation of ``(seed, epoch,
    step, rank)``, and of nothing else: an epoch that starts at ``start_step`` has exactly the
    remaining batches of the whole epoch. All ranks get the same number of batches, of the same
    sizes: an epoch leaves out up to ``world_size - 1`` images. It also leaves out a last batch of a
    single image if ``batch_size`` is larger, as BatchNorm cannot train on it. Each epoch leaves out
    other images.

    In evaluation every image comes exactly once, in order; ranks may differ by one batch.

    Args:
        images: what to iterate over.
        batch_size: images in a batch of one process.
        train: whether for training or for evaluation, see above.
        seed: the run's seed.
        epoch: number of the epoch.
        start_step: how many batches to skip.
        augment: what to do to each image; default: nothing.
        preprocess: converts ``uint8`` to ``float32``.
        device: where the batches go; augmentation and preprocessing happen there.
        rank: of this process, among ``world_size``.
        world_size: the number of processes that share the epoch.

    Returns:
        an iterator over ``x``, ``float32`` of shape :math:`(B, C, H, W)`, and ``y``, ``int64`` of
        shape :math:`(B,)`.

    Examples::

        >>> from kernelnorm.experiments.data import load_images
        >>> digits = load_images("digits", "train")
        >>> x, y = next(batches(digits, 32, train=True, seed=0, epoch=3))
        >>> x.shape, x.dtype, y.shape
        (torch.Size([32, 1, 8, 8]), torch.float32, torch.Size([32]))
    """
    n = len(images)
    steps = steps_per_epoch(n, batch_size, train=train, rank=rank, world_size=world_size)
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step must be between 0 and {steps}, got {start_step}")
    if train and not steps:
        raise ValueError(f"{n} images are too few to train on in {world_size} processes")
    if train:
        order = torch.randperm(n, generator=seeded_generator("order", seed, epoch))
        order = order[: n - n % world_size]
    else:
        order = torch.arange(n)
    own = order[rank::world_size]
    device = torch.device(device)

    def load(step: int) -> tuple[Tensor, Tensor]:
        index = own[step * batch_size : (step + 1) * batch_size]
        x, y = (t.index_select(0, index) for t in (images.pixels, images.labels))
        if device.type == "cuda":  # from pinned memory the copy overlaps with computation
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if augment:
            x = augment(x, seeded_generator("augment", seed, epoch, step, rank))
        return preprocess(x), y

    return map(load, range(start_step, steps))


def seeded_generator(*key: str | int) -> torch.Generator:
    """A generator on the CPU whose state is a function of ``key``."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
