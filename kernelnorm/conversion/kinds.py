"""Classifies layers and functions for a conversion: convolutions, norms, activations, sums, ..."""

from __future__ import annotations

from enum import Enum
from math import prod
from typing import TypeAlias

from torch import nn
from torch.nn.utils import parametrize

from kernelnorm.conversion.record import Call

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "Kind",
    "channels_of_norm",
    "is_convolution",
    "is_layer",
    "kind_of",
    "kind_of_module",
    "layers_inside",
    "name_of_norm",
    "obstacle_of_convolution",
    "obstacle_of_norm",
    "pools_any_size_to_one_pixel",
    "selects_elements",
    "window_size",
]

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

NORMS = {
    "batch": [
        *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
        *("FrozenBatchNorm2d", "FrozenBatchNormAct2d"),  # of torchvision and of timm
    ],
    "group": ["GroupNorm"],
    "instance": ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"],
}
"""The classes of each norm, by name; classes derived from these count, too."""

_KNOWN_NORMS = (
    *("FrozenBatchNorm2d", "FrozenBatchNormAct2d", "BatchNormAct2d", "SyncBatchNormAct"),
    *("GroupNorm1", "GroupNormAct", "GroupNorm1Act"),
)
"""Norms of torchvision and timm whose own ``forward`` is known; see :func:`obstacle_of_norm`."""


class Kind(Enum):
    """The role of a call in a network; a value lists the classes and functions with that role."""

    RELU = "ReLU relu"
    LEAKY_RELU = "LeakyReLU leaky_relu"
    BOUNDED = (
        "ReLU6 Sigmoid Hardsigmoid Softmax relu6 sigmoid hardsigmoid softmax exp square abs sqrt"
    )
    """Another activation whose output is not negative."""
    ACTIVATION = (
        "SiLU GELU Hardswish Mish ELU SELU CELU PReLU Tanh Softplus Hardtanh "
        "silu gelu hardswish mish elu selu celu prelu tanh softplus hardtanh"
    )
    SUM = "add __add__ __radd__ __iadd__"
    CONCATENATION = "cat concat concatenate stack"
    POOLING = (
        "MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d "
        "AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
        "Upsample max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d "
        "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "adaptive_max_pool2d mean amax interpolate"
    )
    """Pooling or interpolation: its output is not negative if its input is not."""
    PRODUCT = "mul __mul__ __rmul__ __imul__ div __truediv__"
    PASSING = (
        "Identity Sequential Dropout Dropout1d Dropout2d Dropout3d Flatten Unflatten "
        "PixelShuffle PixelUnshuffle ChannelShuffle ZeroPad1d ZeroPad2d ZeroPad3d "
        "ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d "
        "ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d "
        "dropout dropout2d chunk split unbind view reshape flatten unflatten squeeze unsqueeze "
        "transpose permute contiguous __getitem__ narrow roll flip expand expand_as pad to float "
        "half bfloat16 double type detach clone pixel_shuffle channel_shuffle"
    )
    """Returns the elements of its input, perhaps reordered, repeated or with zeros added."""
    CONVOLUTION = "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d"
    NORM = " ".join(name for names in NORMS.values() for name in names)
    OTHER = ""


ACTIVATIONS = (Kind.RELU, Kind.LEAKY_RELU, Kind.BOUNDED, Kind.ACTIVATION)

_KINDS = {name: kind for kind in Kind for name in kind.value.split()}


def kind_of(call: Call) -> Kind:
    """The role of a call."""
    if call.module is not None:
        return kind_of_module(call.module)
    name = call.name if call.name.endswith("__") else call.name.removesuffix("_")
    kind = _KINDS.get(name, Kind.OTHER)
    if name in ("clamp", "clamp_min"):
        least = call.options.get("min", call.arguments[1] if len(call.arguments) > 1 else None)
        kind = Kind.BOUNDED if isinstance(least, (int, float)) and least >= 0 else Kind.OTHER
    if name == "pad" and _pads_with_a_number(*call.arguments[2:], **call.options):
        kind = Kind.OTHER
    if name == "interpolate" and call.options.get("mode") == "bicubic":
        kind = Kind.OTHER
    return kind


def _pads_with_a_number(mode: str = "constant", value: float | None = None, **_: object) -> bool:
    """True for the options of :func:`torch.nn.functional.pad` that add other numbers than 0."""
    return mode == "constant" and bool(value)


def kind_of_module(module: nn.Module) -> Kind:
    """The role of a layer: that of the first class in its MRO that has a role."""
    if isinstance(module, nn.Upsample) and module.mode == "bicubic":  # its output can be negative
        return Kind.OTHER
    names = (base.__name__ for base in type(module).__mro__)
    return next((_KINDS[name] for name in names if name in _KINDS), Kind.OTHER)


def pools_any_size_to_one_pixel(call: Call) -> bool:
    """True for a pooling that reduces maps of any size to one pixel, not only maps of this size."""
    name = call.name if call.module is None else type(call.module).__name__
    one = bool(call.outputs) and all(size == 1 for size in call.outputs[0].shape[2:])
    return kind_of(call) is Kind.POOLING and one and ("daptive" in name or name in ("mean", "amax"))


def selects_elements(call: Call) -> bool:
    """True for a pooling or interpolation whose output has elements of its input: no averages."""
    name = call.name if call.module is None else type(call.module).__name__
    mode = getattr(call.module, "mode", call.options.get("mode", "nearest"))
    interpolates = isinstance(call.module, nn.Upsample) or name == "interpolate"
    return "max" in name.lower() or (interpolates and str(mode).startswith("nearest"))


def name_of_norm(module: nn.Module) -> str | None:
    """The key of :data:`NORMS`, or ``None`` if the module is none of these norms."""
    classes = {base.__name__ for base in type(module).__mro__}
    return next((name for name, names in NORMS.items() if classes.intersection(names)), None)


def channels_of_norm(norm: nn.Module) -> int | None:
    """The number of channels of a norm, or ``None`` if no attribute tells it."""
    for name in ("num_features", "num_channels"):
        if isinstance(number := getattr(norm, name, None), int):
            return number
    weight = getattr(norm, "weight", None)  # FrozenBatchNorm2d stores no number
    return None if weight is None else len(weight)


def is_convolution(module: nn.Module | None) -> bool:
    """True for convolutions and transposed convolutions."""
    return isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))


def is_layer(module: nn.Module) -> bool:
    """True for modules recorded as one call: convolutions, norms and PyTorch's own layers."""
    own = type(module).__module__.startswith("torch.nn.") and not [*module.children()]
    return own or is_convolution(module) or name_of_norm(module) is not None


def obstacle_of_convolution(convolution: nn.Module) -> str | None:
    """Why a convolution cannot become a KNConv, or ``None`` if it can."""
    kind = type(convolution).__name__
    if not isinstance(convolution, CONVOLUTIONS):
        return "transposed convolution"
    if parametrize.is_parametrized(convolution):
        return f"{kind} is parametrised"
    if "weight" not in dict(convolution.named_parameters(recurse=False)):
        return f"{kind} computes its weight"
    if "forward" in vars(convolution):
        return f"this {kind} has a forward of its own"
    for base in type(convolution).__mro__:
        if base in CONVOLUTIONS:
            break
        if "__slots__" in vars(base):
            return f"{kind} has slots"
        if base.__name__ != "Conv2dSame" and {"forward", "_conv_forward"}.intersection(vars(base)):
            return f"{kind} has a forward of its own"
    return None


def obstacle_of_norm(norm: nn.Module) -> str | None:
    """Why the conversion does not know what a norm computes, or ``None`` if it does."""
    kind = type(norm).__name__
    if "forward" in vars(norm):
        return f"this {kind} has a forward of its own"
    # Pruning and torch.nn.utils.weight_norm replace a parameter by an ordinary attribute.
    if parametrize.is_parametrized(norm) or {"weight", "bias"} & vars(norm).keys():
        return f"this {kind} computes its parameters"
    for base in type(norm).__mro__:
        if base.__module__.startswith("torch.nn.") or base.__name__ in _KNOWN_NORMS:
            break
        if "forward" in vars(base):
            return f"{kind} has a forward of its own"
    return None


def layers_inside(norm: nn.Module) -> dict[str, nn.Module]:
    """The layers that a norm applies to its output: timm's have an activation and a dropout."""
    known = any(base.__name__ in _KNOWN_NORMS for base in type(norm).__mro__)
    return dict(norm.named_children()) if known else {}


def window_size(convolution: Convolution) -> int:
    """The number of elements of a window."""
    return convolution.in_channels * prod(convolution.kernel_size)
