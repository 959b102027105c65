"""Networks with any of ``kernelnorm.norms.NORMS``, and KNResNets with the kernel norm."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from kernelnorm.models.blocks import has_norm
from kernelnorm.models.densenet import densenet121, densenet161, densenet169, densenet201
from kernelnorm.models.efficientnet import efficientnet_b0
from kernelnorm.models.initialisation import init_convolutions
from kernelnorm.models.knresnet import knresnet13, knresnet18, knresnet34, knresnet50
from kernelnorm.models.mobilenet import mobilenet_v3_small
from kernelnorm.models.published import load_published
from kernelnorm.models.resnet import resnet18, resnet34, resnet50, resnet101
from kernelnorm.models.rules import Rules
from kernelnorm.models.vgg import vgg8
from kernelnorm.norms import describe

__all__ = [
    "Rules",
    "create_model",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "init_convolutions",
    "knresnet13",
    "knresnet18",
    "knresnet34",
    "knresnet50",
    "list_models",
    "load_published",
    "mobilenet_v3_small",
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
    "efficientnet_b0": efficientnet_b0,
    "mobilenet_v3_small": mobilenet_v3_small,
}

_KERNEL_MODELS: dict[str, Callable[..., nn.Module]] = {
    "knresnet13": knresnet13,
    "knresnet18": knresnet18,
    "knresnet34": knresnet34,
    "knresnet50": knresnet50,
}
"""The networks that exist with the kernel norm only."""


def list_models(norm: str = "kernel") -> list[str]:
    """Return the names that :func:`create_model` takes with a norm.

    Args:
        norm: one of ``kernelnorm.norms.NORMS``. With ``"kernel"`` these are all networks; KNResNets
            have no other norm, and ``"nf"`` is for VGG8 and ResNets

    Raises:
        ValueError: if there is no such norm.

    Example::

        >>> sorted({*list_models()} - {*list_models("batch")})
        ['knresnet13', 'knresnet18', 'knresnet34', 'knresnet50']
    """
    describe(norm)  # raises for unknown names
    models = [*_MODELS, *(_KERNEL_MODELS if norm == "kernel" else ())]
    return [name for name in models if has_norm(name, norm)]


def create_model(
    name: str,
    *,
    norm: str = "kernel",
    rules: Rules | Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Return the network ``name``, normalised by ``norm``.

    Args:
        name: one of :func:`list_models`
        norm: one of ``kernelnorm.norms.NORMS``
        rules: for the kernel norm, other rules than the paper's: a :class:`Rules`, or a mapping
            with fields of it
        options: other arguments of the network's function, such as :func:`resnet18`:
            ``num_classes``, ``in_channels``, ``small_images`` (all networks except VGG8 and
            KNResNet-13, which are for small images), ``width`` (VGG8), ``dropout`` (EfficientNet,
            MobileNet) and ``stochastic_depth`` (EfficientNet). KNResNets take ``dropout_p`` and
            ``evaluation`` in place of rules

    Raises:
        ValueError: if there is no such network, norm or rule, the network does not exist with the
            norm, or a rule does nothing in the network.
        TypeError: the network has no such option, or it is a rule.

    Example::

        >>> import torch
        >>> network = create_model("vgg8", norm="kernel", num_classes=7)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 7])
    """
    if name in _KERNEL_MODELS:
        _check_kernel_only(name, norm, rules)
        network = _KERNEL_MODELS[name](**options)
        return _with_config(network, name=name, norm=norm, rules=rules, options=options)
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}, choose one of: {', '.join(list_models())}")
    if given := {*options} & {field.name for field in fields(Rules)}:
        rule = min(given)
        raise TypeError(f"{rule} is a rule: pass rules={{{rule!r}: {options[rule]!r}}}")
    network = _MODELS[name](norm=norm, rules=rules, **options)
    return _with_config(network, name=name, norm=norm, rules=rules, options=options)


def _with_config(network: nn.Module, **config: Any) -> nn.Module:
    """Remember what made the network, for :func:`kernelnorm.hub.save_pretrained`."""
    vars(network)["kernelnorm_config"] = config
    return network


def _check_kernel_only(name: str, norm: str, rules: Rules | Mapping[str, Any] | None) -> None:
    describe(norm)  # raises for unknown names
    if norm != "kernel":
        raise ValueError(
            f"{name} exists with norm='kernel' only, got norm={norm!r}. "
            f"Networks with that norm: {', '.join(list_models(norm))}"
        )
    if rules:
        raise ValueError(
            f"rules are for the paper's networks, got rules={rules!r} for {name}. "
            "Give it dropout_p and evaluation as options"
        )


def __dir__() -> list[str]:
    return sorted(__all__)
