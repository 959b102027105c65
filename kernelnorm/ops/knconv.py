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
from kernelnorm.ops.convolution import convolve, convolve_backward
from kernelnorm.ops.mask import Keys, rounded_p, spread_keys
from kernelnorm.ops.rows_torch import narrow
from kernelnorm.ops.windows import Geometry, box_sum, box_sum_transpose


class Settings(NamedTuple):
    """Everything about a KNConv that is not a tensor."""

    geometry: Geometry
    groups: int
    p: float
    eps: float
    relu: bool


def kn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor | None, settings: Settings
) -> Tensor:
    """KNConv of checked arguments.

    Args:
        keys: of the dropout mask, from :func:`kernelnorm.ops.mask.draw_keys`; ``None`` is for no
            mask, and the statistics are then those expected under ``settings.p``, which are the
            plain ones for 0
        weight: may have a wider dtype than ``x``, which decides the output's
    """
    with without_autocast(x):
        y: Tensor = _KNConv.apply(x, weight, bias, keys, settings)[0]  # type: ignore[no-untyped-call]
    return y


class _KNConv(torch.autograd.Function):
    """What is kept for the backward: the input, the output, and two one-channel maps.

    Without a ReLU the numerator is kept in the output's place, so that whoever comes next may
    change the output in place, as an in-place ReLU or a residual addition does.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor | None, settings: Settings
    ) -> tuple[Tensor, ...]:
        y, numerator, *rest = forward(rows_for(x), x, weight, bias, keys, settings)
        return y, y.new_empty(0) if numerator is None else numerator, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.settings = inputs
        y, numerator, *rest = output
        ctx.mark_non_differentiable(numerator, *rest)
        kept = y if ctx.settings.relu else numerator
        ctx.save_for_backward(*tensors, kept, *rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        needs = ctx.needs_input_grad[:3]
        with without_autocast(grad):
            # Someone differentiates this gradient again: give a gradient that can be.
            gradients = _differentiable_backward if torch.is_grad_enabled() else backward
            return *gradients(grad, ctx.saved_tensors, needs, ctx.settings), None, None


def kappa(p: float, n: int) -> float:
    r"""What is added to the variance of ``n`` elements in place of a mask.

    :math:`\mathbb{E}[\text{var}(m u)] = \text{var}(u) + \kappa \, \text{mean}(u^2)`, exactly.
    """
    p = rounded_p(p)
    return p / (1 - p) * (1 - 1 / max(n, 1))


def forward(
    rows: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The output, its numerator, the windows' mean and inverse deviation, the filters' sums."""
    geometry = settings.geometry
    mask = _mask(x, keys, settings)
    kept, kappa = _dropout(x, keys, settings)
    pixels = prod(geometry.kernel_size)
    factors = 1 / (kept * pixels), 1 / (kept**2 * pixels)
    dtype = narrow(x)

    pair = box_sum(rows.statistics(x, mask), geometry)
    mu, r = rows.moments(pair, factors, kappa, settings.eps, dtype)
    sums = _sums(weight, dtype)

    if keys is not None and x.dtype == dtype:
        # mu differs from the mean of the window by far more than rounding does.
        filters, maps, vectors = weight, [mu], [-sums]
    else:
        # <u, W> - mu S subtracts two numbers that can be large beside their difference. Centred
        # filters have next to no sum, and what rounding leaves of it is taken away again.
        filters = (weight - _as_filters(sums / weight[0].numel(), weight)).to(x.dtype)
        rest = _sums(filters, dtype)
        maps, vectors = [mu], [-rest]
        if keys is not None or settings.groups > 1:
            means = x.unflatten(1, (settings.groups, -1)).mean(2, dtype=dtype).to(pair.dtype)
            means = box_sum(means, geometry) / pixels
            maps = [(means - factors[0] * pair[0]).to(dtype), means.to(dtype)]
            vectors = [sums, -rest]
    z = convolve(x, filters, geometry, settings.groups)
    return *rows.epilogue(z, maps, vectors, r, bias, settings.relu), mu, r, sums


def backward(
    grad: Tensor,
    saved: tuple[Any, ...],
    needs: tuple[bool, ...],
    settings: Settings,
    into: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the input, which is added to ``into`` if given, the weight and the bias."""
    x, weight, bias, keys, output, mu, r, sums = saved
    needs_x, needs_weight, needs_bias = needs
    rows = rows_for(x)
    geometry, groups = settings.geometry, settings.groups
    kept, kappa = _dropout(x, keys, settings)
    elements = x.shape[1] * prod(geometry.kernel_size)
    factors = 1 / (kept * elements), 2 * (1 + kappa) / (kept**2 * elements)

    grad_z, pair, grad_bias, grad_sums = rows.output_gradient(
        grad, output, r, mu, sums, bias, settings.relu, factors
    )
    filters = weight.to(x.dtype)
    grad_x, grad_weight = convolve_backward(
        grad_z, x, filters, geometry, groups, needs_x, needs_weight, into
    )
    if grad_x is not None:
        pair = box_sum_transpose(pair, geometry, x.shape[2:])
        grad_x = rows.input_gradient(grad_x, x, pair, _mask(x, keys, settings))
        if into is not None and grad_x is not into:
            grad_x = into.copy_(grad_x)
    if grad_weight is not None:
        grad_sums = _as_filters(grad_sums, weight)
        grad_weight = grad_weight.to(grad_sums.dtype).add_(grad_sums).to(weight.dtype)
    return grad_x, grad_weight, grad_bias.to(bias.dtype) if needs_bias else None


def _differentiable_backward(
    grad: Tensor, saved: tuple[Any, ...], needs: tuple[bool, ...], settings: Settings
) -> tuple[Tensor | None, ...]:
    """The same gradients, from operations that can be differentiated once more."""
    x, weight, bias, keys, *_ = saved
    inputs = [x, weight] if bias is None else [x, weight, bias]

    def output(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return forward(differentiable_rows(), x, weight, bias, keys, settings)[0]

    gradients = [*torch.func.vjp(output, *inputs)[1](grad), None]
    return tuple(g if need else None for g, need in zip(gradients[:3], needs, strict=True))


def _mask(x: Tensor, keys: Tensor | None, settings: Settings) -> Keys | None:
    return None if keys is None else spread_keys(keys, x.shape, settings.p)


def _dropout(x: Tensor, keys: Tensor | None, settings: Settings) -> tuple[float, float]:
    """The part of the elements that the mask keeps, and kappa where there is no mask."""
    if keys is None:
        return 1.0, kappa(settings.p, x.shape[1] * prod(settings.geometry.kernel_size))
    return 1 - rounded_p(settings.p), 0.0


def _sums(filters: Tensor, dtype: torch.dtype) -> Tensor:
    return filters.sum(tuple(range(1, filters.dim())), dtype=dtype)


def _as_filters(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 1))


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Inside, dtypes are chosen one by one."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
