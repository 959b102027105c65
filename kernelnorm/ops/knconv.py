r"""KNConv by Equation 5: a convolution, and an adjustment by each window's statistics.

With :math:`u` a window of the input, :math:`n` its number of elements, :math:`m` the dropout mask,
:math:`u' = m u`, and :math:`S_k` the sum of the weights of filter :math:`k`:

.. math::
    \mu = \text{mean}(u') \qquad
    V = \text{mean}(u'^2) - \mu^2 \qquad
    r = (V + \kappa (V + \mu^2) + \epsilon)^{-1/2} \qquad
    y_k = \text{act}((\langle u, W_k \rangle - \mu S_k) r + b_k)

:math:`\kappa` is zero where a mask is drawn and where dropout is off. In between stands the
variance that a mask would give on average, :math:`\mathbb{E}[\text{var}(m u)]`, for which
:math:`\kappa = \frac{p}{1-p} (1 - \frac1n)`.

This file names no backend: the row primitives come from :func:`kernelnorm.ops.rows_for`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelnorm.ops import differentiable_rows, rows_for
from kernelnorm.ops.mask import rounded_p
from kernelnorm.ops.windows import Geometry, box_sum, box_sum_transpose


class Settings(NamedTuple):
    """Everything about a KNConv that is not a tensor."""

    geometry: Geometry
    groups: int
    p: float
    eps: float
    relu: bool


def kn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, settings: Settings
) -> Tensor:
    """KNConv of checked arguments.

    Args:
        seed: of the dropout mask; ``None`` draws none, and the statistics are then those expected
            under ``settings.p``, which are the plain ones for 0
        weight: may have a wider dtype than ``x``, which decides the output's
    """
    with _without_autocast(x):
        y: Tensor = _KNConv.apply(x, weight, bias, seed, settings)[0]  # type: ignore[no-untyped-call]
    return y


class _KNConv(torch.autograd.Function):
    """What is kept for the backward: the input, the output, and two one-channel maps.

    Without a ReLU the numerator is kept in the output's place, so that whoever comes next may
    change the output in place, as an in-place ReLU or a residual addition does.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, settings: Settings
    ) -> tuple[Tensor, ...]:
        y, numerator, *rest = _forward(rows_for(x), x, weight, bias, seed, settings)
        return y, y.new_empty(0) if settings.relu else numerator, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, seed, ctx.settings = inputs
        y, numerator, *rest = output
        ctx.mark_non_differentiable(numerator, *rest)
        kept = y if ctx.settings.relu else numerator
        ctx.save_for_backward(x, weight, bias, seed, kept, *rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        needs = ctx.needs_input_grad[:3]
        with _without_autocast(grad):
            # Someone differentiates this gradient again: give a gradient that can be.
            gradients = _differentiable_backward if torch.is_grad_enabled() else _backward
            return *gradients(grad, ctx.saved_tensors, needs, ctx.settings), None, None


def kappa(p: float, n: int) -> float:
    r"""What is added to the variance of ``n`` elements in place of a mask.

    :math:`\mathbb{E}[\text{var}(m u)] = \text{var}(u) + \kappa \, \text{mean}(u^2)`, exactly.
    """
    p = rounded_p(p)
    return p / (1 - p) * (1 - 1 / max(n, 1))


def _forward(
    rows: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, its numerator, the windows' mean and inverse deviation, the filters' sums."""
    geometry, groups, p, eps, relu = settings
    # The maps are small, and the variance is a difference: float64 wherever there is one.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    narrow = torch.float64 if x.dtype == torch.float64 else torch.float32

    maps = torch.cat(rows.statistics(x, seed, p, wide), 1)
    mean, square = (box_sum(maps, geometry) / prod(geometry.kernel_size)).split(1, 1)
    var = (square - mean.square()).clamp_min(0)
    if seed is None:
        var = var + kappa(p, x.shape[1] * prod(geometry.kernel_size)) * (var + mean.square())
    r = (var + eps).rsqrt().to(narrow)
    mu = mean.to(narrow)
    sums = weight.flatten(1).sum(1, dtype=narrow)

    if seed is not None and x.dtype == narrow:
        # mu differs from the mean of the window by far more than rounding does.
        filters, terms, factors = weight, [mu], [-sums]
    else:
        # <u, W> - mu S subtracts two numbers that can be large beside their difference. Centred
        # filters have next to no sum, and what rounding leaves of it is taken away again.
        shape = (-1, *[1] * (weight.dim() - 1))
        filters = (weight - (sums / weight[0].numel()).view(shape)).to(x.dtype)
        rest = filters.flatten(1).sum(1, dtype=narrow)
        terms, factors = [mu], [-rest]
        if seed is not None or groups > 1:
            means = x.unflatten(1, (groups, -1)).mean(2, dtype=narrow).to(wide)
            means = box_sum(means, geometry) / prod(geometry.kernel_size)
            terms, factors = [(means - mean).to(narrow), means.to(narrow)], [sums, -rest]
    z = torch.convolution(x, filters, None, *_convolution_arguments(settings))
    return *rows.epilogue(z, terms, factors, r, bias, relu), mu, r, sums


def _backward(
    grad: Tensor, saved: tuple[Any, ...], needs: tuple[bool, ...], settings: Settings
) -> tuple[Tensor | None, ...]:
    x, weight, bias, seed, kept, mu, r, sums = saved
    needs_x, needs_weight, needs_bias = needs
    rows = rows_for(x)
    geometry = settings.geometry

    grad_z, grad_r, grad_mu, grad_bias, grad_sums = rows.output_gradient(
        grad, kept, r, mu, sums, bias, settings.relu
    )
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_z, x, weight.to(x.dtype), None, *_convolution_arguments(settings),
        (needs_x, needs_weight, False),
    )  # fmt: skip
    if needs_x:
        grad_var = -0.5 * r**3 * grad_r
        grad_mean = grad_mu - 2 * mu * grad_var
        elements = x.shape[1] * prod(geometry.kernel_size)
        grad_square = grad_var if seed is not None else (1 + kappa(settings.p, elements)) * grad_var
        maps = torch.cat([grad_mean, 2 * grad_square], 1) / elements
        a, b = box_sum_transpose(maps, geometry, x.shape[2:]).split(1, 1)
        grad_x = rows.input_gradient(grad_x, x, a, b, seed, settings.p)
    if needs_weight:
        shape = (-1, *[1] * (weight.dim() - 1))
        grad_weight = (grad_weight.to(weight.dtype) + grad_sums.view(shape)).to(weight.dtype)
    if needs_bias:
        grad_bias = grad_bias.to(bias.dtype)
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
    )


def _differentiable_backward(
    grad: Tensor, saved: tuple[Any, ...], needs: tuple[bool, ...], settings: Settings
) -> tuple[Tensor | None, ...]:
    """The same gradients, from operations that can be differentiated once more."""
    x, weight, bias, seed, *_ = saved
    inputs = [x, weight] if bias is None else [x, weight, bias]

    def output(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _forward(differentiable_rows(), x, weight, bias, seed, settings)[0]

    gradients = [*torch.func.vjp(output, *inputs)[1](grad), None]
    return tuple(g if need else None for g, need in zip(gradients[:3], needs, strict=True))


def _convolution_arguments(settings: Settings) -> tuple[Any, ...]:
    _, stride, padding, dilation = settings.geometry
    return stride, padding, dilation, False, (0,) * len(stride), settings.groups


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Inside, dtypes are chosen one by one."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
