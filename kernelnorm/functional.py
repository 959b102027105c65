"""Kernel normalisation as functions, without state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelnorm import arguments
from kernelnorm.arguments import Evaluation
from kernelnorm.ops import knconv, observers
from kernelnorm.ops.backends import backend_for, compute_dtype, eager
from kernelnorm.ops.mask import draw_keys, expand_keys, keep, rounded_p
from kernelnorm.ops.pixel_norm import pixel_norm
from kernelnorm.ops.settings import Settings

__all__ = ["backend", "kernel_norm", "kn_conv"]


def kernel_norm(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    *,
    dropout_p: float = 0.1,
    training: bool = True,
    eps: float = 1e-5,
    evaluation: Evaluation = "expected",
) -> Tensor:
    r"""Normalise each window of the input by its own mean and variance.

    See :class:`~kernelnorm.KernelNorm2d` for the formula and the arguments. A sequence
    ``kernel_size`` has one number for each spatial dimension. If it is one integer, the input must
    have a batch.

    Shape:
        - input: :math:`(N, C, L_1, ..., L_d)` or :math:`(C, L_1, ..., L_d)` with :math:`d` of 1, 2
          or 3
        - Output: :math:`(N, C, O_1, ..., O_d)` or :math:`(C, O_1, ..., O_d)`,
          :math:`O_i = k_i \lfloor (L_i + 2 p_i - k_i) / s_i + 1 \rfloor`

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, or a numeric
            argument is not a number
        ValueError: an argument is out of its range, or no window fits into the padded input

    Example::

        >>> x = torch.randn(8, 3, 32, 32)
        >>> kernel_norm(x, 3, stride=2, padding=1).shape
        torch.Size([8, 3, 48, 48])
    """
    arguments.check_tensor("input", input)
    if isinstance(kernel_size, Sequence):
        d = len(kernel_size)
        arguments.check_spatial_dims("kernel_size", d, kernel_size)
    else:
        d = input.dim() - 2
        arguments.check_spatial_dims("input", d, input.shape)
    arguments.check_input(input.shape, input.dtype, d)
    stride = kernel_size if stride is None else stride
    padding = arguments.integers("padding", padding, d, at_least=0)
    geometry = arguments.geometry(d, kernel_size, stride, padding, 1)
    arguments.check_normalization(dropout_p, eps, evaluation)
    x = input if input.dim() == d + 2 else input.unsqueeze(0)
    arguments.check_windows_fit(observers.sizes(x)[2:], geometry)
    p, masked = _dropout(dropout_p, training, evaluation)
    settings = Settings(geometry, 1, p, masked, eps, None)
    with observers.without_autocast(x):
        x_hat = _normalize(x.to(compute_dtype(x)), settings)
    return (x_hat if input.dim() == d + 2 else x_hat.squeeze(0)).to(input.dtype)


def _normalize(x: Tensor, settings: Settings) -> Tensor:
    """The normalised windows, laid side by side."""
    if settings.geometry.pointwise:
        keys = draw_keys(x.shape, x.device) if settings.masked else None
        return pixel_norm(x, keys, settings)
    if settings.masked:
        return _normalize_masked(x, settings)
    mu, rstd, *_ = eager.window_statistics(x, None, settings, with_means=False)
    geometry = settings.geometry
    x = F.pad(x, [size for size in reversed(geometry.padding) for _ in range(2)])
    for i, (k, stride) in enumerate(zip(geometry.kernel_size, geometry.stride, strict=True)):
        place = torch.arange(mu.shape[2 + i] * k, device=x.device)
        window = place // k
        x = x.index_select(2 + i, window * stride + place % k)
        mu, rstd = (maps.index_select(2 + i, window) for maps in (mu, rstd))
    return (x - mu) * rstd


def _normalize_masked(x: Tensor, settings: Settings) -> Tensor:
    """Unfold the windows and compute Equations 1 to 3, with a mask for each window."""
    geometry, d = settings.geometry, x.dim() - 2
    # (N, C, P_1, ..., P_d, k_1, ..., k_d): each window, as a view of the padded input
    u = F.pad(x, [size for size in reversed(geometry.padding) for _ in range(2)])
    for i, (k, stride) in enumerate(zip(geometry.kernel_size, geometry.stride, strict=True)):
        u = u.unfold(2 + i, k, stride)
    unit = [1, *range(2 + d, u.dim())]
    mask = keep(expand_keys(draw_keys(u.shape, u.device), u.shape, settings.p), u.dtype)
    dropped = u * mask / (1 - rounded_p(settings.p))
    mu = dropped.mean(unit, keepdim=True)
    var = (dropped - mu).square().mean(unit, keepdim=True)
    u_hat = (u - mu) * (var + settings.eps).rsqrt()
    u_hat = u_hat.permute(0, 1, *(axis for i in range(d) for axis in (2 + i, 2 + d + i)))
    sizes = [k * u.shape[2 + i] for i, k in enumerate(geometry.kernel_size)]
    return u_hat.reshape(*x.shape[:2], *sizes)


def kn_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    dropout_p: float = 0.1,
    training: bool = True,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
    evaluation: Evaluation = "expected",
) -> Tensor:
    r"""Convolve windows that are normalised by their own mean and variance.

    See :class:`~kernelnorm.KNConv2d` for the formula and the arguments. There are as many spatial
    dimensions as ``weight`` has. ``activation`` is ``None``, ``"relu"`` or ``"leaky_relu"``, with
    ``negative_slope`` from 0.001 to 1.

    Shape:
        - input: :math:`(N, C, L_1, ..., L_d)` or :math:`(C, L_1, ..., L_d)` with :math:`d` of 1, 2
          or 3
        - weight: :math:`(K, C / \text{groups}, k_1, ..., k_d)`
        - bias: :math:`(K,)`
        - Output: that of :func:`torch.nn.functional.conv2d`

    Raises:
        TypeError: a tensor is not a dense floating-point tensor, the dtypes differ outside of
            autocast, or a numeric argument is not a number
        ValueError: an argument is out of its range, shapes do not fit each other, or the window is
            larger than the padded input

    Example::

        >>> x, weight = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 3, 3)
        >>> kn_conv(x, weight, padding=1, activation="relu").shape
        torch.Size([8, 16, 32, 32])
    """
    arguments.check_same_device(input, weight, bias)
    plan = _plan_for(
        input, weight, bias, stride, padding, dilation, groups, padding_mode,
        dropout_p, training, eps, activation, negative_slope, evaluation,
    )  # fmt: skip
    x = input if plan.batched else input.unsqueeze(0)
    if plan.sides:
        x = F.pad(x, plan.sides, plan.mode)
    x = _autocast(x, weight, bias)  # after F.pad, which may change the dtype
    keys = draw_keys(x.shape, x.device) if plan.settings.masked else None
    y = knconv.kn_conv(x, weight, bias, keys, plan.settings)
    return y if plan.batched else y.squeeze(0)


def backend(input: Tensor) -> str:
    """Return the name of the backend that computes a KNConv of the input.

    ``"cpu"`` are the C kernels, ``"triton"`` the Triton kernels for GPUs, and ``"eager"`` PyTorch
    operations, for every other device and dtype and for installations without a C compiler.

    Args:
        input: a tensor on the device and with the dtype of the layer's input

    Example::

        >>> backend(torch.ones(1, 3, 8, 8, dtype=torch.float16))
        'eager'
    """
    arguments.check_tensor("input", input)
    return backend_for(input).name


class _Plan(NamedTuple):
    """Everything derived from the shapes, dtypes and options of :func:`kn_conv`."""

    batched: bool
    sides: tuple[int, ...]  # padding of the input beforehand, as F.pad takes it
    mode: str
    settings: Settings


def _plan_for(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> _Plan:
    """Check the arguments of :func:`kn_conv` and return its plan, which is cached.

    Args:
        options: the arguments of :func:`kn_conv` after the tensors, in the same order
    """
    sizes = observers.sizes(input), observers.sizes(weight)
    shape_of_bias = None if bias is None else observers.sizes(bias)
    key = sizes[0], input.dtype, sizes[1], weight.dtype, shape_of_bias, *options
    if torch.compiler.is_compiling() or not _hashable(key) or any(map(_may_change, options[:3])):
        return _plan(*key)
    return _remembered_plan(*key)


def _plan(
    shape: Sequence[int],
    dtype: torch.dtype,
    weight: Sequence[int],
    weight_dtype: torch.dtype,
    bias: Sequence[int] | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    dropout_p: float,
    training: bool,
    eps: float,
    activation: str | None,
    negative_slope: float,
    evaluation: Evaluation,
) -> _Plan:
    d = len(weight) - 2
    arguments.check_spatial_dims("weight", d, weight)
    arguments.check_input(shape, dtype, d)
    arguments.check_filters(shape, weight, weight_dtype, bias, groups)
    geometry = arguments.geometry(d, tuple(weight[2:]), stride, padding, dilation)
    arguments.check_normalization(dropout_p, eps, evaluation)
    arguments.check_convolution(activation, negative_slope, padding_mode)

    sides, geometry = arguments.pad_first(geometry, padding, padding_mode)
    sizes = list(shape[-d:])
    if sides:
        pairs = zip(sides[-2::-2], sides[::-2], strict=True)  # F.pad begins with the last dimension
        sizes = [size + sum(pair) for size, pair in zip(sizes, pairs, strict=True)]
    arguments.check_windows_fit(sizes, geometry)

    p, masked = _dropout(dropout_p, training, evaluation)
    slope = arguments.slope(activation, negative_slope)
    settings = Settings(geometry, groups, p, masked, eps, slope)
    mode = arguments.PADDING_MODES[padding_mode]
    return _Plan(len(shape) == d + 2, sides, mode, settings)


_remembered_plan = functools.lru_cache(maxsize=4096, typed=True)(_plan)


def _hashable(key: tuple[Any, ...]) -> bool:
    """False if the key has lists or symbolic sizes."""
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _may_change(option: Any) -> bool:
    """True for stride, padding or dilation as tensors, which are hashed by identity."""
    several = option if isinstance(option, tuple) else (option,)
    return any(isinstance(value, Tensor) for value in several)


def _dropout(p: float, training: bool, evaluation: Evaluation) -> tuple[float, bool]:
    """The probability of dropout on the statistics, and whether a mask is drawn."""
    if training or evaluation == "monte_carlo":
        return p, rounded_p(p) > 0
    return (p if evaluation == "expected" else 0.0), False


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The input in autocast's dtype; like the layers of torch.nn, it leaves float64 alone."""
    if observers.is_autocast_on(x) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    arguments.check_same_dtype(x, weight, bias)
    return x
