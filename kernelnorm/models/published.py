"""Loads the weights of KNResNets that the paper's authors have published."""

import argparse
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernelnorm.models.knresnet import KNResNet, knresnet18, knresnet34, knresnet50

PUBLISHED: dict[str, Callable[..., KNResNet]] = {
    "knresnet18": knresnet18,
    "knresnet34": knresnet34,
    "knresnet50": knresnet50,
}
"""The networks for which there are published weights."""


def load_published(network: str | nn.Module, file: str | Path) -> KNResNet:
    """Load the weights of a KNResNet from a file that the paper's authors have published.

    The file is read with ``weights_only=True``. Besides tensors it may hold the options of the
    authors' program, an :class:`argparse.Namespace`; nothing else is unpickled.

    Args:
        network: ``"knresnet18"``, ``"knresnet34"`` or ``"knresnet50"``; the file then determines
            the number of classes, the channels of the images, and whether the network is for small
            images. Or such a network, whose weights are replaced
        file: a dictionary saved by PyTorch, with the state dict under ``"model"``

    Returns:
        The network, in evaluation mode. A network given by name has ``evaluation="expected"``. The
        authors evaluated with ``"monte_carlo"``: see :func:`kernelnorm.set_evaluation`.

    Raises:
        FileNotFoundError: there is no such file
        ValueError: the network is not one of these; the file has no state dict, or has an object
            that is not safe to unpickle; or the state dict belongs to another network

    Example::

        >>> network = load_published("knresnet18", "knresnet18.pt")  # doctest: +SKIP
    """
    known = network in PUBLISHED if isinstance(network, str) else isinstance(network, KNResNet)
    if not known:
        kind = repr(network) if isinstance(network, str) else f"a {type(network).__name__}"
        raise ValueError(f"no weights are published for {kind}, only for {', '.join(PUBLISHED)}")
    file = Path(file)
    published = _read(file)
    name = network if isinstance(network, str) else "the network"
    if isinstance(network, str):
        network = PUBLISHED[network](**_options(published, file))
    assert isinstance(network, KNResNet)
    names = published_names(network)
    shapes = {theirs: network.get_parameter(ours).shape for theirs, ours in names.items()}
    if wrong := _differences(published, shapes):
        shown = "; ".join(wrong[:3]) + f"; and {len(wrong) - 3} more" * (len(wrong) > 3)
        raise ValueError(f"{file} does not fit {name}: {shown}. Is it of another network?")
    network.load_state_dict({ours: published[theirs] for theirs, ours in names.items()})
    return network.eval()


def published_names(network: KNResNet) -> dict[str, str]:
    """Return the published name of each parameter with its name in ``network``.

    The published names number the blocks through all stages, and have one more level for 1x1
    convolutions.

    Example::

        >>> names = published_names(knresnet18(num_classes=10))
        >>> names["res_block3.conv1.weight"]
        'stage2.0.conv1.weight'
    """
    modules = {"block0.0": "stem", "fc": "fc"}
    blocks = 0
    for stage in range(1, 5):
        if stage > 1:
            modules[f"trans_block{stage - 1}.conv"] = f"transition{stage - 1}.conv"
        for index, block in enumerate(network.get_submodule(f"stage{stage}").children()):
            blocks += 1
            for name, _ in block.named_children():
                if name.startswith("conv"):
                    modules[f"res_block{blocks}.{name}"] = f"stage{stage}.{index}.{name}"
    if len(network.last):
        modules["conv_block_f.conv"] = "last.conv"
    names = {}
    for theirs, ours in modules.items():
        module = network.get_submodule(ours)
        deeper = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        for parameter, _ in module.named_parameters():
            names[f"{theirs}{'.conv1x1' * deeper}.{parameter}"] = f"{ours}.{parameter}"
    return names


def _read(file: Path) -> Mapping[str, Tensor]:
    """The state dict in a file.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_published`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: give a file that the authors published")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        if unsafe is None:
            raise ValueError(f"{file} is not a file of PyTorch, or damaged") from error
        raise ValueError(
            f"{file} was not read, as it holds {unsafe[1]}, which is not safe to unpickle: "
            "it may hold tensors and an argparse.Namespace only"
        ) from error
    except Exception as error:  # a damaged file can fail in every layer of the reader
        raise ValueError(f"{file} is not a file of PyTorch, or damaged") from error
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict) or not model:
        raise ValueError(f"{file} holds no state dict under 'model', as the published files do")
    if not all(isinstance(k, str) and isinstance(x, Tensor) for k, x in model.items()):
        raise ValueError(f"{file}: 'model' must hold tensors by name, as the published files do")
    return model


def _options(published: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """The options of the network that a state dict belongs to."""
    stem, linear = published.get("block0.0.weight"), published.get("fc.weight")
    if stem is None or linear is None or stem.dim() != 4 or linear.dim() != 2:
        raise ValueError(
            f"{file} is not of a KNResNet: it must have block0.0.weight of 4 dimensions and "
            f"fc.weight of 2; it has {', '.join([*published][:3])}, ..."
        )
    return {
        "num_classes": linear.shape[0],
        "in_channels": stem.shape[1],
        "small_images": stem.shape[2] == 3,
    }


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> list[str]:
    """The differences between a state dict and the expected shapes, one phrase per tensor."""
    lacking = [f"{name} is missing" for name in expected if name not in found]
    shapes = [
        f"{name} has shape {tuple(x.shape)}, not {tuple(expected[name])}"
        for name, x in found.items()
        if name in expected and x.shape != expected[name]
    ]
    return [*shapes, *lacking, *(f"{name} is unknown" for name in found if name not in expected)]
