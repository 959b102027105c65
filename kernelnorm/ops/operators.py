"""A KNConv as two operators of PyTorch, for compilers and dispatch modes.

``kernelnorm::kn_conv`` and ``kernelnorm::kn_conv_backward`` change none of their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernelnorm.ops.backends import backend_for, compute_dtype
from kernelnorm.ops.observers import refuse_tangents, without_autocast
from kernelnorm.ops.passes import backward, forward
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry


def kn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor | None, settings: Settings
) -> Tensor:
    """Call the operator ``kernelnorm::kn_conv``; see :func:`kernelnorm.ops.knconv.kn_conv`."""
    y: Tensor = torch.ops.kernelnorm.kn_conv(x, weight, bias, keys, *_flat(settings))[0]
    return y


_OPTIONS = (
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "float p, bool masked, float eps, bool activation, float slope"
)


def _flat(settings: Settings) -> tuple[Any, ...]:
    """The settings as arguments of an operator, in the order of ``_OPTIONS``."""
    geometry, *options, slope = settings
    return *map(list, geometry), *options, slope is not None, slope or 0.0


def _settings(options: Sequence[Any]) -> Settings:
    """The reverse of :func:`_flat`."""
    *geometry, groups, p, masked, eps, activation, slope = options
    window = Geometry(*map(tuple, geometry))
    return Settings(window, groups, p, masked, eps, slope if activation else None)


@torch.library.custom_op(
    "kernelnorm::kn_conv",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor? keys, {_OPTIONS}) "
    "-> (Tensor y, Tensor numerator, Tensor mu, Tensor rstd, Tensor filter_sums)",
)
def _kn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    refuse_tangents(x, weight, bias)
    with without_autocast(x):
        result = forward(x, weight, bias, keys, _settings(options))
    y, numerator, *rest = result
    return y, y.new_empty(0) if numerator is None else numerator, *rest


@_kn_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, keys: Any, *options: Any) -> tuple[Tensor, ...]:
    settings = _settings(options)
    y = backend_for(x).convolution(x, weight.to(x.dtype), settings)  # with its strides
    numerator = torch.empty_like(y) if settings.slope is None else y.new_empty(0)
    mu = y.new_empty((y.shape[0], 1, *y.shape[2:]), dtype=compute_dtype(x))
    return y, numerator, mu, torch.empty_like(mu), mu.new_empty(weight.shape[0])


@torch.library.custom_op(
    "kernelnorm::kn_conv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? keys, Tensor[] saved, "
    f"bool[] needs, {_OPTIONS}) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
)
def _kn_conv_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weight, bias, keys, saved, needs, *options = arguments
    with without_autocast(x):
        gradients = backward(grad, x, weight, bias, keys, saved, _settings(options), needs)
    return tuple(
        grad.new_empty(0) if g is None or like is None else _strided_like(g, like)
        for g, like in zip(gradients, (x, weight, bias), strict=True)
    )


def _strided_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the strides that the fake operator promises to compilers."""
    strides = torch.empty_like(like, device="meta").stride()
    return x if x.stride() == strides else torch.empty_like(like).copy_(x)


@_kn_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weight, bias, _, _, needs, *_ = arguments
    inputs = zip((x, weight, bias), needs, strict=True)
    return tuple(torch.empty_like(t) if need else grad.new_empty(0) for t, need in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.settings = *inputs[:4], _settings(inputs[4:])
    y, numerator, *rest = output
    ctx.mark_non_differentiable(numerator, *rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, numerator if ctx.settings.slope is None else y, *rest)


def _operator_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14  # 4 tensors, and the 10 of _OPTIONS
    *inputs, kept, mu, rstd, sums = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:3]]
    gradients = torch.ops.kernelnorm.kn_conv_backward(
        grad, *inputs, [kept, mu, rstd, sums], needs, *_flat(ctx.settings)
    )
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return *wanted, *[None] * 11


_kn_conv.register_autograd(_operator_backward, setup_context=_setup_context)
