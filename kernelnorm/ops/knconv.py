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

This file names no backend: the row primitives come from :func:`kernelnorm.ops.primitives_for`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelnorm.ops import DIFFERENTIABLE, Primitives, few_windows, pointwise, primitives_for
from kernelnorm.ops.rows_torch import narrow, wide
from kernelnorm.ops.statistics import as_filters, filter_sums
from kernelnorm.ops.windows import Geometry, box_sum

_LEAST_P = 1e-3
r"""Of a layer whose means need no more care than those of a mask: :math:`|\mu| r` is below
:math:`\kappa^{-1/2}`, about :math:`p^{-1/2}`."""


class Settings(NamedTuple):
    """Everything about a KNConv that is not a tensor."""

    geometry: Geometry
    groups: int
    p: float
    eps: float
    relu: bool
    factors: tuple[float, float]  # from gradient_factors


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
    arguments = x, weight, bias, keys, settings
    with without_autocast(x):
        if torch._C._are_functorch_transforms_active():
            y: Tensor = _Transformable.apply(*arguments)[0]  # type: ignore[no-untyped-call]
        else:
            y = _KNConv.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


class _KNConv(torch.autograd.Function):
    """What is kept for the backward: the input, the output, and two one-channel maps.

    Without a ReLU the numerator is kept in the output's place, so that whoever comes next may
    change the output in place, as an in-place ReLU or a residual addition does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keys: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        y, numerator, *rest = forward(primitives_for(x), x, weight, bias, keys, settings)
        kept = y if numerator is None else numerator
        ctx.settings = settings
        ctx.save_for_backward(x, weight, bias, keys, kept, *rest)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        with without_autocast(grad):
            # Someone differentiates this gradient again: give a gradient that can be.
            gradients = _differentiable_backward if torch.is_grad_enabled() else backward
            return *gradients(grad, ctx.saved_tensors, needs, ctx.settings), None, None


class _Transformable(torch.autograd.Function):
    """The same for ``torch.func``, which wants the context apart; such a call takes longer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor | None, settings: Settings
    ) -> tuple[Tensor, ...]:
        y, numerator, *rest = forward(primitives_for(x), x, weight, bias, keys, settings)
        return y, y.new_empty(0) if numerator is None else numerator, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.settings = inputs
        y, numerator, *rest = output
        ctx.mark_non_differentiable(numerator, *rest)
        ctx.save_for_backward(*tensors, y if ctx.settings.relu else numerator, *rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return (None,) * 5 if grad is None else _KNConv.backward(ctx, grad)


def forward(
    primitives: Primitives,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    settings: Settings,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The output, its numerator, the windows' mean and inverse deviation, the filters' sums.

    Args:
        into: where the output is written to, if anywhere
    """
    geometry, groups, p, eps, relu, _ = settings
    dtype = narrow(x)
    # A mask moves mu by far more than rounding does, and what stands for it in evaluation keeps
    # |mu| r small: see _LEAST_P.
    uncentred = x.dtype == dtype and (keys is not None or p >= _LEAST_P)
    of_maps = dtype if uncentred else wide(x)
    mu, r, sums, x = primitives.window_statistics(x, weight, keys, p, geometry, eps, of_maps)
    if uncentred:
        filters, maps, vectors = weight, [mu], [sums]
    else:
        # <u, W> - mu S subtracts two numbers that can be large beside their difference. Centred
        # filters have next to no sum, and what rounding leaves of it is taken away again.
        filters = (weight - as_filters(sums / weight[0].numel(), weight)).to(x.dtype)
        rest = filter_sums(filters, dtype)
        maps, vectors = [mu.to(dtype)], [rest]
        if keys is not None or groups > 1:
            means = x.unflatten(1, (groups, -1)).mean(2, dtype=dtype).to(mu.dtype)
            means = box_sum(means, geometry) / prod(geometry.kernel_size)
            maps = [(mu - means).to(dtype), means.to(dtype)]
            vectors = [sums, rest]
        mu, r = mu.to(dtype), r.to(dtype)
    plain = primitives is not DIFFERENTIABLE  # what follows is not traced or batched
    if plain and pointwise.pays(x, filters, geometry):
        z = pointwise.convolution(x, filters)
    else:
        z = torch.convolution(x, filters, None, *_arguments(geometry, groups))
    return *primitives.epilogue(z, maps, vectors, r, bias, relu, into), mu, r, sums


def backward(
    grad: Tensor,
    saved: tuple[Any, ...],
    needs: tuple[bool, ...],
    settings: Settings,
    total: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the input, the weight and the bias.

    Args:
        total: what the input's gradient is added to, in place
    """
    x, weight, bias, keys, output, mu, r, sums = saved
    needs_x, needs_weight, needs_bias = needs
    geometry, groups, p, _, relu, factors = settings
    primitives = DIFFERENTIABLE if _is_several(grad) else primitives_for(x)
    grad_z, pair, grad_bias, grad_sums = primitives.output_gradient(
        grad, output, r, mu, sums, bias, relu, factors
    )
    plain = primitives is not DIFFERENTIABLE
    few = plain and needs_weight and few_windows.pays(x, weight, mu.numel(), groups)
    arguments = grad_z, x, weight.to(x.dtype)
    wanted = needs_x, needs_weight and not few
    if plain and pointwise.pays(x, weight, geometry):
        grad_x, grad_weight = pointwise.convolution_backward(*arguments, wanted)
    else:
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
            *arguments, None, *_arguments(geometry, groups), (*wanted, False)
        )
    grad_x, grad_weight = primitives.through_statistics(
        grad_x, grad_weight, x, pair, grad_sums, keys, p, geometry, total
    )
    if few:
        grad_weight = few_windows.weight_gradient(grad_z, x, mu, geometry)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight, grad_bias.to(bias.dtype) if needs_bias else None


def _differentiable_backward(
    grad: Tensor, saved: tuple[Any, ...], needs: tuple[bool, ...], settings: Settings
) -> tuple[Tensor | None, ...]:
    """The same gradients, from operations that can be differentiated once more."""
    x, weight, bias, keys, *_ = saved
    inputs = [x, weight] if bias is None else [x, weight, bias]

    def output(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return forward(DIFFERENTIABLE, x, weight, bias, keys, settings)[0]

    gradients = [*torch.func.vjp(output, *inputs)[1](grad), None]
    return tuple(g if need else None for g, need in zip(gradients[:3], needs, strict=True))


def _is_several(grad: Tensor) -> bool:
    """Whether it stands for a batch of gradients, as ``is_grads_batched`` of autograd has it.

    Such a tensor has no memory of its own to work on.
    """
    if torch.compiler.is_compiling():
        return False
    several: bool = torch._C._functorch.is_legacy_batchedtensor(grad)
    return several


def _arguments(geometry: Geometry, groups: int) -> tuple[Any, ...]:
    """Those of a convolution."""
    _, stride, padding, dilation = geometry
    return stride, padding, dilation, False, (0,) * len(stride), groups


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Inside, dtypes are chosen one by one."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
