"""The paper's networks, each with any of the norms in ``kernelnorm.norms.NORMS``."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kernelnorm.models.blocks import Rules
from kernelnorm.models.densenet import densenet121, densenet161, densenet169, densenet201
from kernelnorm.models.resnet import resnet18, resnet34, resnet50, resnet101
from kernelnorm.models.vgg import vgg8

__all__ = [
    "Rules",
    "create_model",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "list_models",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "vgg8",
]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg8": vgg8,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "densenet121": densenet121,
    "densenet161": densenet161,
    "densenet169": densenet169,
    "densenet201": densenet201,
}


def list_models() -> list[str]:
    """Returns the names that :func:`create_model` takes."""
    return list(_MODELS)


def create_model(
    name: str,
    *,
    norm: str = "kernel",
    rules: Rules | Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Returns the network ``name``, normalised by ``norm``.

    Args:
        name: one of :func:`list_models`
        norm: one of ``kernelnorm.norms.NORMS``
        rules: for the kernel norm, other rules than the paper's: a :class:`Rules`, or a mapping
            with fields of it
        options: what else the constructor takes: ``num_classes``, ``in_channels``, and
            ``small_images`` (ResNet, DenseNet) or ``width`` (VGG8, which is for small images)

    Raises:
        ValueError: if there is no such network, norm or rule, or a rule does nothing there.

    Example::

        >>> import torch
        >>> network = create_model("vgg8", norm="kernel", num_classes=7)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 7])
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}, choose one of: {', '.join(_MODELS)}")
    return _MODELS[name](norm=norm, rules=rules, **options)


def __dir__() -> list[str]:
    return sorted(__all__)
