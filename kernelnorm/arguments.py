"""Checks the arguments of users: each error names the argument, its value and what is expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kernelnorm.ops.windows import Geometry

Evaluation = Literal["expected", "plain", "monte_carlo"]
"""What replaces the dropout on the statistics in evaluation; see :class:`kernelnorm.KNConv2d`."""

_EVALUATIONS = get_args(Evaluation)

# The padding modes of torch.nn, each with its name in torch.nn.functional.pad.
PADDING_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


def geometry(
    d: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> Geometry:
    """The checked geometry of the window; a named padding is 0 here, see :func:`pad_first`."""
    kernel_size = integers("kernel_size", kernel_size, d, at_least=1)
    stride = integers("stride", stride, d, at_least=1)
    dilation = integers("dilation", dilation, d, at_least=1)
    if not isinstance(padding, str):
        padding = integers("padding", padding, d, at_least=0)
        return Geometry(kernel_size, stride, padding, dilation)
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
    if padding == "same" and set(stride) != {1}:
        raise ValueError(f"padding='same' needs a stride of 1, got stride {stride}")
    return Geometry(kernel_size, stride, (0,) * d, dilation)


def pad_first(
    geometry: Geometry, padding: int | Sequence[int] | str, padding_mode: str
) -> tuple[tuple[int, ...], Geometry]:
    """How to pad the input before a convolution, and the geometry of that convolution.

    A convolution pads with zeros only, and pads opposite sides alike. Any other padding is a step
    of its own before the convolution.

    Returns:
        The padding of the input in the format of :func:`torch.nn.functional.pad`, empty if the
        convolution pads; and the geometry with the padding that the convolution adds.
    """
    size, stride, before, dilation = geometry
    after = before
    if padding == "same":
        totals = [geometry.reach(i) - 1 for i in range(len(size))]
        before = tuple(total // 2 for total in totals)
        after = tuple(total - total // 2 for total in totals)
    if padding_mode == "zeros" and before == after:
        return (), Geometry(size, stride, before, dilation)
    pairs = [*zip(before, after, strict=True)]
    sides = tuple(side for pair in reversed(pairs) for side in pair)
    return sides, Geometry(size, stride, (0,) * len(size), dilation)


def integers(name: str, value: int | Sequence[int] | str, d: int, at_least: int) -> tuple[int, ...]:
    """One integer for each of ``d`` dimensions, from a number or a sequence."""
    given: Any = value
    if not isinstance(value, (int, str)) and hasattr(value, "tolist"):  # a tensor or an array
        given = value.tolist()
    several = isinstance(given, Iterable) and not isinstance(given, str)
    values: tuple[Any, ...] = tuple(given) if several else (given,) * d
    if not all(isinstance(v, int) for v in values):  # such as the integers of NumPy
        values = tuple(v.__index__() if hasattr(v, "__index__") else v for v in values)
    if len(values) == 1:
        values = values * d
    if len(values) != d or not all(_is_integer(v, at_least) for v in values):
        raise ValueError(
            f"{name} must be an integer of at least {at_least} and below 2**31, or {d} of them, "
            f"got {value!r}"
        )
    return values


_MOST = (1 << 31) - 1  # products of two fit into the 64 bits that the kernels compute with


def _is_integer(value: object, at_least: int) -> bool:
    """True for integers, also NumPy's and a compiler's, but not for booleans."""
    integer = isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)
    return integer and at_least <= value <= _MOST  # type: ignore[operator]


def _check_number(name: str, value: object) -> None:
    """Check for a number, also NumPy's and a compiler's, but no tensor."""
    if isinstance(value, (int, float)):
        return
    if isinstance(value, Tensor) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")


_LEAST_EPS = torch.finfo(torch.float32).tiny  # a smaller one would be 0 in float32


def check_probability(name: str, value: float) -> None:
    """Check for a probability below 1, such as that of dropout."""
    _check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")


def check_eps(eps: float) -> None:
    """Check the number that is added to variances."""
    _check_number("eps", eps)
    if not _LEAST_EPS <= eps < math.inf:
        raise ValueError(f"eps must be at least {_LEAST_EPS:.1e} and finite, got {eps}")


def check_normalization(dropout_p: float, eps: float, evaluation: str) -> None:
    """Check the arguments that KernelNorm and KNConv share."""
    check_probability("dropout_p", dropout_p)
    check_eps(eps)
    if evaluation not in _EVALUATIONS:
        raise ValueError(f"evaluation must be one of {_EVALUATIONS}, got {evaluation!r}")


_LEAST_SLOPE = 1e-3  # the backward pass divides by the slope to get the input of a LeakyReLU


def has_slope(negative_slope: float) -> bool:
    """True if a KNConv can fuse a LeakyReLU of this slope."""
    return _LEAST_SLOPE <= negative_slope <= 1


def fused(activation: str | nn.Module | None) -> tuple[str | None, float]:
    """The name and negative slope of the activation that a KNConv fuses.

    The name is ``None`` without an activation, and for a module that the layer applies to its
    output afterwards.
    """
    if type(activation) is nn.LeakyReLU and has_slope(activation.negative_slope):
        return "leaky_relu", activation.negative_slope
    return (None if isinstance(activation, nn.Module) else activation), 0.01


def slope(activation: str | None, negative_slope: float) -> float | None:
    """The slope of the activation for negative numbers; ``None`` without an activation."""
    return {None: None, "relu": 0.0, "leaky_relu": negative_slope}[activation]


def check_convolution(activation: str | None, negative_slope: float, padding_mode: str) -> None:
    """Check the activation and the padding mode of a KNConv."""
    if activation not in (None, "relu", "leaky_relu"):
        raise ValueError(
            f"activation must be None, 'relu', 'leaky_relu' or a layer's module, got {activation!r}"
        )
    _check_number("negative_slope", negative_slope)
    if not has_slope(negative_slope):
        raise ValueError(f"negative_slope must be from {_LEAST_SLOPE} to 1, got {negative_slope}")
    if not isinstance(padding_mode, str) or padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {[*PADDING_MODES]}, got {padding_mode!r}")


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NAMES_OF_DTYPES = "float32, float64, bfloat16 or float16"


def check_input(shape: Sequence[int], dtype: torch.dtype, d: int) -> None:
    """Check for a floating-point input with ``d`` spatial dimensions, with or without a batch."""
    if dtype not in _DTYPES:
        raise TypeError(f"input must be in {_NAMES_OF_DTYPES}, got {dtype}")
    if len(shape) not in (d + 1, d + 2):
        raise ValueError(
            f"input must have {d + 2} dimensions, or {d + 1} without a batch, "
            f"got shape {tuple(shape)}"
        )


def check_spatial_dims(name: str, d: int, shape: Sequence[int]) -> None:
    """Check that the argument ``name`` is for one, two or three spatial dimensions."""
    if d not in (1, 2, 3):
        raise ValueError(
            f"{name} must be for 1, 2 or 3 spatial dimensions, not {d}, got {tuple(shape)}"
        )


def check_counts(**counts: object) -> None:
    """Check that each argument is a positive integer."""
    for name, value in counts.items():
        if not _is_integer(value, at_least=1):
            raise ValueError(
                f"{name} must be an integer of at least 1 and below 2**31, got {value!r}"
            )


def check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """Check the numbers of channels, and that ``groups`` divides them."""
    check_counts(in_channels=in_channels, out_channels=out_channels)
    if not _is_integer(groups, at_least=1) or in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups must be a positive integer that divides in_channels={in_channels} and "
            f"out_channels={out_channels}, got {groups!r}"
        )


def check_filters(
    input: Sequence[int],
    weight: Sequence[int],
    weight_dtype: torch.dtype,
    bias: Sequence[int] | None,
    groups: int,
) -> None:
    """Check that the shapes of input, weight and bias fit each other."""
    out_channels, d = weight[0], len(weight) - 2
    if weight_dtype not in _DTYPES:
        raise TypeError(f"weight must be in {_NAMES_OF_DTYPES}, got {weight_dtype}")
    if not _is_integer(groups, at_least=1) or out_channels % groups:
        raise ValueError(
            f"groups must be a positive integer that divides the {out_channels} output channels, "
            f"got {groups!r}"
        )
    in_channels = weight[1] * groups
    if in_channels < 1:
        raise ValueError(f"weight must have at least 1 input channel, got shape {tuple(weight)}")
    if input[-d - 1] != in_channels:
        raise ValueError(
            f"input must have {in_channels} channels for a weight of shape {tuple(weight)} "
            f"and groups={groups}, got {input[-d - 1]} in shape {tuple(input)}"
        )
    if bias is not None and tuple(bias) != (out_channels,):
        raise ValueError(f"bias must have shape ({out_channels},), got {tuple(bias)}")


def check_same_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that input, weight and bias have one dtype."""
    dtype = input.dtype
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        others = f"weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise TypeError(f"input must have the weight's dtype, got input {dtype}, {others}")


def check_tensor(name: str, value: Tensor) -> None:
    """Check for a dense tensor, not a NumPy array or a sparse tensor for example."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {value.layout}")


def check_same_device(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that input, weight and bias are tensors on one device."""
    check_tensor("input", input)
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
    device = input.device
    if weight.device != device or (bias is not None and bias.device != device):
        others = f"weight on {weight.device}"
        others += "" if bias is None else f", bias on {bias.device}"
        raise ValueError(
            f"input and weight must be on one device, got input on {device}, {others}. "
            "Move the module with .to(device)"
        )


def check_windows_fit(sizes: Sequence[int], geometry: Geometry) -> None:
    """Check that a window fits into the padded input; ``sizes`` are those without the padding."""
    for i, size in enumerate(sizes):
        padded = size + 2 * geometry.padding[i]
        if geometry.reach(i) > padded:
            raise ValueError(
                f"kernel_size {geometry.kernel_size} with dilation {geometry.dilation} is larger "
                f"than the padded input: {geometry.reach(i)} against {padded} pixels along "
                f"dimension {i - len(geometry.kernel_size)}"
            )
