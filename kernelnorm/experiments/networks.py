"""Build the network of a run, and start it from given weights."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor, nn

from kernelnorm import models
from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.saved import load_checked
from kernelnorm.models import create_model

__all__ = ["Weights", "build_network", "read_weights", "start_from"]


def build_network(config: RunConfig, *, num_classes: int, in_channels: int) -> nn.Module:
    """Build the untrained network of a run, in the memory format ``channels_last``.

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
    except (RuntimeError, TypeError, ValueError) as error:  # RuntimeError: too large for the memory
        raise RunError(f"cannot build {config.model}: {_reason(error, config)}") from error
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _reason(error: Exception, config: RunConfig) -> str:
    """Return why a network cannot be built; for an unknown option, the options that it has."""
    taken = inspect.signature(getattr(models, config.model)).parameters
    known = [name for name in taken if name not in ("norm", "num_classes", "in_channels")]
    unknown = [name for name in config.model_options if name not in known]
    if not unknown or "unexpected keyword" not in str(error):
        return str(error)
    return f"unknown option {unknown[0]!r} in --model-options, choose from: {', '.join(known)}"


@dataclass(frozen=True)
class Weights:
    """Initial weights: tensors by their names in a state dict, and the file or folder read."""

    tensors: Mapping[str, Tensor]
    source: Path

    def fingerprint(self) -> str:
        """Return a hash of names, shapes, types and values."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            raw = tensor.detach().contiguous().flatten().view(torch.uint8)
            digest.update(np.ascontiguousarray(raw.numpy()).data)
        return digest.hexdigest()


def read_weights(source: str | Path) -> Weights:
    """Read weights from a run's folder (its ``best.ckpt``) or a file of PyTorch or safetensors.

    A file holds a dictionary of tensors, or has it under ``"model"`` or ``"state_dict"``.

    Raises:
        RunError: there are no weights, or they cannot be read.
    """
    source = Path(source).expanduser()
    file = source / "best.ckpt" if source.is_dir() else source
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        elif is_zipfile(file):
            found = load_checked(file)
        else:  # files of PyTorch before 1.6 have no checksums
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
    for name, x in tensors.items():
        if x.layout is not torch.strided or x.is_quantized:
            raise RunError(f"{name} in {file} is {x.type()}: save dense weights, not quantised")
    if not tensors:
        raise RunError(f"{file} holds no weights: expected tensors by name, or a run's checkpoint")
    return Weights(tensors, source)


def start_from(weights: Weights, network: nn.Module, num_classes: int) -> list[str]:
    """Copy weights into a network; return the names of the tensors that keep their initial values.

    These are the tensors of the last layer, if the weights are for another number of classes.

    Raises:
        RunError: other tensors are missing, unknown, or have another shape; nothing is copied.
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
            f"{'; '.join(wrong[:3])}{more}. {_advice(weights.source)}"
        )
    matching = {name: x for name, x in weights.tensors.items() if name not in fresh}
    network.load_state_dict(matching, strict=False)
    return fresh


def _advice(source: Path) -> str:
    """Return advice for weights that do not fit; for a run's weights, the options of that run."""
    if not source.is_dir():
        return "Give the --model, --norm and --model-options of that network"
    content = RunFolder(source).read_config()
    config = RunConfig.from_dict(content["run"])
    options = f"--model {config.model} --norm {config.norm}"
    if config.model_options:
        options += f" --model-options '{json.dumps(config.model_options)}'"
    match content.get("image_shape"):
        case [int(channels), _, _]:
            options += f", on images with {channels} colour channel{'s' * (channels > 1)}"
    return f"They are of a run with {options}"
