"""Networks of runs: built, loaded with their preprocessing and class names, or begun from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kernelnorm.experiments.data import Preprocess, read_image
from kernelnorm.experiments.data.decode import to_pixels
from kernelnorm.experiments.recipes import RunConfig
from kernelnorm.experiments.runs import RunError, RunFolder
from kernelnorm.models import create_model

__all__ = ["Trained", "Weights", "build_network", "load", "read_weights", "start_from"]

Checkpoint = Literal["best", "last"]


@dataclass(frozen=True)
class Trained:
    """The network of a run, and what is needed to use it.

    Args:
        network: in evaluation, on the CPU.
        classes: the names of the outputs.
        image_shape: of the images that it was trained on: channels, height and width.
        pixels: from bytes to what the network takes.
        config: how it was trained.
    """

    network: nn.Module
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    pixels: Preprocess
    config: RunConfig

    def preprocess(self, image: str | Path | Image.Image | Tensor) -> Tensor:
        """What the network takes for an image: a batch of one.

        Args:
            image: a file, a picture of Pillow, or ``uint8`` of shape :math:`(C, H, W)`. Files and
                pictures are resized as the training images were, if those were square.

        Returns:
            ``float32`` of shape :math:`(1, C, H, W)`.

        Raises:
            TypeError: the image is none of these.
        RunError: the image does not have the size of the training images.
            DataError: the file cannot be read.
        """
        channels, height, width = self.image_shape
        size = height if height == width else None
        if isinstance(image, Image.Image):
            pixels = to_pixels(image.convert("L" if channels == 1 else "RGB"), size)
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
        return self.pixels(pixels[None])


def load(run: str | Path, checkpoint: Checkpoint = "best") -> Trained:
    """Loads the network of a run with its preprocessing and class names.

    Args:
        run: the run's folder.
        checkpoint: ``"best"``, the weights with the best test accuracy, or ``"last"``.

    Raises:
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
    config = RunConfig.from_record(content["run"])
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
        pixels = _pixels(content)
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder.path / 'config.yaml'} is damaged: it must have classes, image_shape and "
            "standardise. Restore it, or train anew in another --out"
        ) from error
    network = build_network(config, num_classes=len(classes), in_channels=channels)
    try:
        network.load_state_dict(state["model"])
    except (KeyError, RuntimeError) as error:
        raise RunError(
            f"{folder.path / checkpoint}.ckpt does not fit the run: {_first_line(error)}"
        ) from error
    return Trained(network.eval(), classes, (channels, height, width), pixels, config)


def build_network(config: RunConfig, *, num_classes: int, in_channels: int) -> nn.Module:
    """Builds the untrained network of a run, in the memory format that convolutions like.

    Raises:
        RunError: the model does not take the configuration's options.
    """
    try:
        network = create_model(
            config.model,
            norm=config.norm,
            num_classes=num_classes,
            in_channels=in_channels,
            **config.model_options,
        )
    except (TypeError, ValueError) as error:
        raise RunError(f"cannot build {config.model}: {error}. See --model-options") from error
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Weights:
    """Weights to begin from: tensors by the names of a network's, and their source."""

    tensors: Mapping[str, Tensor]
    source: Path

    def fingerprint(self) -> str:
        """Tells whether others are the same weights, wherever they lie."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            raw = tensor.detach().contiguous().flatten().view(torch.uint8)
            digest.update(np.ascontiguousarray(raw.numpy()).data)
        return digest.hexdigest()


def read_weights(source: str | Path) -> Weights:
    """Reads weights from a run's folder (its ``best.ckpt``) or a file of PyTorch or safetensors.

    A file may hold the tensors themselves, or under ``"model"`` or ``"state_dict"``.

    Raises:
        RunError: there are none, or they cannot be read.
    """
    source = Path(source).expanduser()
    file = source / "best.ckpt" if source.is_dir() else source
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise RunError(f"to read {file}: pip install safetensors") from error
    except OSError as error:
        raise RunError(f"cannot read weights from {file}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can fail in every layer of the reader
        raise RunError(
            f"{file} holds no weights that can be read safely ({type(error).__name__}): give a "
            "run's folder, or a file of tensors by name"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = {
        name: x
        for name, x in (found.items() if isinstance(found, dict) else ())
        if isinstance(name, str) and isinstance(x, Tensor)
    }
    if not tensors:
        raise RunError(f"{file} holds no weights: expected tensors by name, or a run's checkpoint")
    return Weights(tensors, source)


def start_from(weights: Weights, network: nn.Module, num_classes: int) -> list[str]:
    """Copies weights into a network, and returns the names of those that keep their own values.

    These are the last layer's, if it has another number of classes.

    Raises:
        RunError: other weights are missing, or have another shape; nothing is copied then.
    """
    own = network.state_dict()
    fresh, wrong = [], []
    for name, x in own.items():
        other = weights.tensors.get(name)
        if other is not None and other.shape == x.shape:
            continue
        head = x.dim() > 0 and len(x) == num_classes and other is not None
        if head and other is not None and other.shape[1:] == x.shape[1:]:
            fresh.append(name)
        else:
            shape = "is missing" if other is None else f"has shape {tuple(other.shape)}"
            wrong.append(f"{name} {shape} there, {tuple(x.shape)} here")
    wrong += [f"{name} is not here" for name in weights.tensors if name not in own]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RunError(
            f"the weights in {weights.source} are of another network: "
            f"{'; '.join(wrong[:3])}{more}. Give the --model, --norm and --model-options of theirs"
        )
    matching = {name: x for name, x in weights.tensors.items() if name not in fresh}
    network.load_state_dict(matching, strict=False)
    return fresh


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pixels(content: Mapping[str, Any]) -> Preprocess:
    statistics = content["standardise"]
    if statistics is None:
        return Preprocess()
    return Preprocess(mean=tuple(statistics["mean"]), std=tuple(statistics["std"]))
