"""Saves networks as folders, and loads them from a folder or from the Hugging Face Hub.

A folder has a configuration and the weights, as safetensors: nothing is unpickled. Folders need the
package safetensors; repositories on the Hub need huggingface_hub, too. Both are imported when
a function needs them.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import nn

from kernelnorm import models

__all__ = ["from_pretrained", "save_pretrained"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
"""The names of the two files, as in Hugging Face's libraries."""


def save_pretrained(network: nn.Module, folder: str | Path) -> None:
    """Write a network to a folder, as ``config.json`` and ``model.safetensors``.

    ``hf upload NAME/REPOSITORY FOLDER`` puts the folder on the Hub.

    Args:
        network: a network of :func:`kernelnorm.models.create_model`. Its weights may have changed
            since, but not its layers
        folder: the folder, which is created if it does not exist; existing files of the two names
            are replaced

    Raises:
        ImportError: the package safetensors is not installed
        ValueError: ``create_model`` did not make the network, its layers have changed since, or an
            option cannot be written as JSON

    Example::

        >>> network = models.create_model("vgg8", num_classes=7)
        >>> save_pretrained(network, "vgg8")  # doctest: +SKIP
        >>> network = from_pretrained("vgg8")  # doctest: +SKIP
    """
    safetensors = _needed("safetensors.torch", "safetensors")
    config = _config_of(network)
    _check_layers(network, _empty_network(config))
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=folder) as part:  # a failure leaves the old files
        safetensors.save_file(tensors, Path(part, WEIGHTS), metadata={"format": "pt"})
        Path(part, CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for name in (WEIGHTS, CONFIG):  # only a kill between the two could mix old and new
            Path(part, name).replace(folder / name)


def from_pretrained(source: str | Path, **download: Any) -> nn.Module:
    """Return the network that :func:`save_pretrained` wrote, in evaluation mode.

    Args:
        source: a folder, or the name of a repository on the Hub, ``user/name``
        download: for a repository, options of ``huggingface_hub.hf_hub_download``: ``revision``,
            ``token``, ``cache_dir``, ``local_files_only`` and others

    Raises:
        FileNotFoundError: the folder does not exist, or lacks one of the two files
        ImportError: a package that is needed is not installed
        ValueError: a file is damaged, the configuration has other fields than those that
            ``save_pretrained`` writes or describes no network, or there are download options for a
            folder
        RuntimeError: the names or shapes of the weights are not those of the configuration's
            network
    """
    safetensors = _needed("safetensors.torch", "safetensors")
    files = [_find(source, name, download) for name in (CONFIG, WEIGHTS)]
    try:
        network = _empty_network(_read_config(files[0]))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{files[0]} describes no network: {error}") from error
    try:
        mapped = safetensors.load_file(files[1])
    except _needed("safetensors", "safetensors").SafetensorError as error:
        raise ValueError(f"{files[1]} is damaged: {error}") from error
    # Copied: safetensors maps the file into memory, and the file may change or disappear.
    weights = {name: tensor.clone() for name, tensor in mapped.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


def _needed(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs the package {package}: pip install {package}") from error


def _find(source: str | Path, name: str, download: Mapping[str, Any]) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: expected a folder that save_pretrained wrote"
            )
        if download:
            raise ValueError(f"{', '.join(download)} are for the Hub, but {folder} is a folder")
        return folder / name
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(
            f"there is no folder {source}, and the name of a repository on the Hub is user/name"
        )
    hub = _needed("huggingface_hub", "huggingface_hub")
    return Path(hub.hf_hub_download(str(source), name, **download))


def _config_of(network: nn.Module) -> dict[str, Any]:
    """The arguments of create_model that rebuild the network, including defaults of its options."""
    given = getattr(network, "kernelnorm_config", None)
    if given is None:
        raise ValueError(
            f"save_pretrained takes a network of kernelnorm.models.create_model, got a "
            f"{type(network).__name__} made in another way"
        )
    rules = given["rules"]
    bound = inspect.signature(getattr(models, given["name"])).bind_partial(**given["options"])
    bound.apply_defaults()
    options = {
        name: value for name, value in bound.arguments.items() if name not in ("norm", "rules")
    }
    for name, value in options.items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise ValueError(f"option {name}={value!r} cannot be saved: it is no JSON value")
    return {
        "name": given["name"],
        "norm": given["norm"],
        "rules": asdict(rules) if isinstance(rules, models.Rules) else rules and dict(rules),
        "options": options,
    }


_FIELDS = {
    "name": (str,),
    "norm": (str,),
    "rules": (dict, type(None)),
    "options": (dict,),
}
"""The fields of a configuration and their types."""


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict) or {*config} != {*_FIELDS}:
        found = sorted(config) if isinstance(config, dict) else type(config).__name__
        raise ValueError(
            f"{file} must have the fields {', '.join(_FIELDS)}, got {found}: "
            "was it written by save_pretrained?"
        )
    for name, types in _FIELDS.items():
        if not isinstance(config[name], types):
            raise ValueError(f"{file}: {name} must be a {types[0].__name__}, got {config[name]!r}")
    if twice := sorted({*_FIELDS} & {*config["options"]}):
        raise ValueError(f"{file}: options must not have the field {twice[0]}")
    return config


def _empty_network(config: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration, on the meta device: its weights take no memory."""
    options = {"norm": config["norm"], "rules": config["rules"], **config["options"]}
    with torch.device("meta"):
        return models.create_model(config["name"], **options)


def _check_layers(network: nn.Module, expected: nn.Module) -> None:
    lines = zip_longest(repr(network).splitlines(), repr(expected).splitlines(), fillvalue="")
    for line, created in lines:
        if line != created:
            raise ValueError(
                "the network has other layers than create_model gave it, so its configuration "
                f"would not rebuild it: got {line.strip()!r}, expected {created.strip()!r}. "
                "Give create_model the options that change them (num_classes, rules, ...)"
            )
    shapes, wanted = _shapes(network), _shapes(expected)
    other = [name for name in {**wanted, **shapes} if wanted.get(name) != shapes.get(name)]
    if other:
        raise ValueError(
            f"the network has other tensors than create_model gave it, such as {other[0]!r}, so "
            "they could not be loaded again: remove its parametrizations, pruning or weight norms "
            "first"
        )


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}
