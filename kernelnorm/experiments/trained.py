"""Load the network of a run with its preprocessing and class names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.data import Preprocess, read_image
from kernelnorm.experiments.data.decode import to_pixels, upright
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.networks import build_network
from kernelnorm.experiments.runs import RunFolder

__all__ = ["Checkpoint", "Trained", "load"]

Checkpoint = Literal["best", "last"]


@dataclass(frozen=True)
class Trained:
    """The network of a run, and what is needed to use it.

    Args:
        network: the network in evaluation mode, on the CPU.
        classes: the names of the outputs.
        image_shape: channels, height and width of the training images.
        to_input: converts a batch of ``uint8`` images to the network's input.
        config: the run's configuration.
    """

    network: nn.Module
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    to_input: Preprocess
    config: RunConfig

    def preprocess(self, image: str | Path | Image.Image | Tensor) -> Tensor:
        """Return the network's input for an image: a batch of one.

        Args:
            image: a file, a Pillow image, or ``uint8`` of shape :math:`(C, H, W)`. Files and Pillow
                images are resized as the training images were, if these were square.

        Returns:
            ``float32`` of shape :math:`(1, C, H, W)`.

        Raises:
            TypeError: the image is none of these.
            RunError: the image does not have the size of the training images.
            DataError: the file cannot be read, or the image has more than 8 bits per channel.
        """
        channels, height, width = self.image_shape
        size = height if height == width else None
        if isinstance(image, Image.Image):
            pixels = to_pixels(upright(image, channels), size)
        elif isinstance(image, Tensor):
            pixels = image
        elif isinstance(image, (str, Path)):
            pixels = read_image(image, size, channels)
        else:
            raise TypeError(f"image must be a file, a PIL.Image or a tensor, got {type(image)}")
        if pixels.dtype != torch.uint8 or pixels.shape != self.image_shape:
            name = f" {image}" if isinstance(image, (str, Path)) else ""
            raise RunError(
                f"the image{name} must be uint8 with {channels} channels, {width} pixels wide and "
                f"{height} high, like the training images; it is {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}: bring it to that size"
            )
        return self.to_input(pixels[None])


def load(run: str | Path, checkpoint: Checkpoint = "best") -> Trained:
    """Load the network of a run with its preprocessing and class names.

    Args:
        run: the run's folder.
        checkpoint: ``"best"``, the weights with the best test accuracy, or ``"last"``.

    Raises:
        ValueError: ``checkpoint`` is neither.
        RunError: the folder holds no such checkpoint, or a damaged one.

    Example::

        >>> import kernelnorm as kn
        >>> trained = kn.load("runs/photos/kernel-b32-seed0-0123abcd")  # doctest: +SKIP
        >>> scores = trained.network(trained.preprocess("cat.jpg"))  # doctest: +SKIP
        >>> trained.classes[scores.argmax()]  # doctest: +SKIP
        'cat'
    """
    if checkpoint not in ("best", "last"):
        raise ValueError(f"checkpoint must be 'best' or 'last', got {checkpoint!r}")
    folder = RunFolder(Path(run).expanduser())
    content = folder.read_config()
    config = RunConfig.from_dict(content["run"])
    state = folder.load(f"{checkpoint}.ckpt")
    if state is None:
        failure = folder.read_failure()
        reason = "yet: train it further"
        if failure is not None and failure["kind"] == "diverged":
            reason = "since training diverged: train anew with a smaller --lr"
        raise RunError(f"{folder.path} has no {checkpoint}.ckpt {reason}")
    try:
        classes = tuple(map(str, content["classes"]))
        channels, height, width = map(int, content["image_shape"])
        to_input = _preprocess(content)
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder.path / 'config.yaml'} is damaged: it must have classes, image_shape and "
            "standardise. Restore it, or train anew in another --out"
        ) from error
    with torch.device("meta"):  # draws no random weights
        network = build_network(config, num_classes=len(classes), in_channels=channels)
    try:
        network.load_state_dict(state["model"], assign=True)
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise RunError(
            f"{folder.path / checkpoint}.ckpt does not fit the run: {_first_line(error)}"
        ) from error
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(network.eval(), classes, (channels, height, width), to_input, config)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _preprocess(content: Mapping[str, Any]) -> Preprocess:
    statistics = content["standardise"]
    if statistics is None:
        return Preprocess()
    return Preprocess(mean=tuple(statistics["mean"]), std=tuple(statistics["std"]))
