r"""KNConv by Equation 5: a convolution, adjusted by the statistics of each window.

With :math:`u` a window of the input, :math:`n` its number of elements, :math:`m` the dropout mask,
:math:`u' = m u`, and :math:`S_k` the sum of the weights of filter :math:`k`:

.. math::
    \mu = \text{mean}(u') \qquad
    V = \text{mean}(u'^2) - \mu^2 \qquad
    \text{rstd} = (V + \kappa (V + \mu^2) + \epsilon)^{-1/2} \qquad
    y_k = \text{act}((\langle u, W_k \rangle - \mu S_k) \, \text{rstd} + b_k)

:math:`\kappa` is zero where a mask is drawn and where dropout is off. Otherwise it stands for the
variance that a mask would give on average, see :func:`kernelnorm.ops.mask.dropout_variance`.

A call takes one of three ways. Functional transforms and exporters get PyTorch operations.
Compilers and dispatch modes get one operator, ``kernelnorm::kn_conv``. Everyone else gets an
autograd function that calls the backend directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelnorm.ops import observers
from kernelnorm.ops.backends import Backend, Statistics, backend_for, compute_dtype, eager
from kernelnorm.ops.concatenation import parts_of
from kernelnorm.ops.settings import Settings, constants
from kernelnorm.ops.windows import Geometry

_LEAST_P = 1e-3
r"""The smallest dropout probability for which float32 filters need no centring:
:math:`|\mu| \, \text{rstd}` is below :math:`\kappa^{-1/2}`, about :math:`p^{-1/2}`."""


def kn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor | None, settings: Settings
) -> Tensor:
    """KNConv of checked arguments.

    Args:
        weight: may have a wider dtype than ``x``; the output has the dtype of ``x``
        keys: of the dropout mask, from :func:`kernelnorm.ops.mask.draw_keys`; given if and only if
            ``settings.masked``
    """
    if observers.needs_plain_operations(x, weight, bias, keys):
        with without_autocast(x):
            return forward(eager, x, weight, bias, keys, settings).y
    if observers.is_observed():
        y, *_ = torch.ops.kernelnorm.kn_conv(x, weight, bias, keys, *_flat(settings))
    else:
        y = _KNConv.apply(x, weight, bias, keys, settings)  # type: ignore[no-untyped-call]
    result: Tensor = y
    return result


class Forward(NamedTuple):
    """The output of a forward pass, and what its backward pass needs.

    ``numerator`` is ``None`` with a ReLU, which lets the backward pass take ``y`` instead. Without
    one the caller may change ``y`` in place, as a residual addition does.
    """

    y: Tensor
    numerator: Tensor | None
    mu: Tensor
    rstd: Tensor
    filter_sums: Tensor


def forward(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    settings: Settings,
) -> Forward:
    """The forward pass in the primitives of a backend."""
    dtype = compute_dtype(x)
    sums = _sum_filters(weight, dtype)
    # A mask moves mu by far more than rounding does, and the variance that stands for it in
    # evaluation keeps |mu| rstd small. Otherwise <u, W> - mu S can be the difference of two large
    # numbers, unless the filters are centred; what rounding leaves of their sums is subtracted.
    centred = x.dtype != dtype or not (settings.masked or settings.p >= _LEAST_P)
    apart = centred and (settings.masked or settings.groups > 1)
    statistics = backend.window_statistics(x, keys, settings, apart)
    if not centred:
        filters, terms = weight, [(statistics.mu, sums)]
    else:
        filters = weight - (sums / weight[0].numel()).view(-1, *[1] * (weight.dim() - 1))
        filters = filters.to(x.dtype)
        rest = _sum_filters(filters, dtype)
        terms = [(statistics.mu, rest)]
        if statistics.offset is not None and statistics.means is not None:
            terms = [(statistics.offset, sums), (statistics.means, rest)]
    z = backend.convolution(x, filters, settings)
    y, numerator = backend.epilogue(z, terms, statistics.rstd, bias, settings.relu)
    return Forward(y, numerator, statistics.mu, statistics.rstd, sums)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    saved: Sequence[Tensor],
    settings: Settings,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the input, the weight and the bias, each ``None`` if not needed.

    Args:
        saved: the numerator or, with a ReLU, the output; then mu, rstd and filter sums
    """
    kept, mu, rstd, sums = saved
    needs_x, needs_weight, needs_bias = needs
    backend = backend_for(x) if observers.has_storage(grad) else eager
    factors = constants(settings, x.shape[1])
    grad_z, pair, grad_bias, grad_sums = backend.epilogue_backward(
        grad, kept, Statistics(mu, rstd), sums, bias, settings.relu,
        (factors.grad_mean, factors.grad_var),
    )  # fmt: skip
    grad_x, grad_weight = backend.convolution_backward(
        grad_z, x, weight.to(x.dtype), mu, grad_sums, settings, (needs_x, needs_weight)
    )
    if grad_x is not None:
        grad_x = backend.statistics_backward(grad_x, x, pair, keys, settings)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return (
        grad_x,
        grad_weight,
        grad_bias.to(bias.dtype) if needs_bias and bias is not None else None,
    )


class _KNConv(torch.autograd.Function):
    """Keeps the input, the output or numerator, and two one-channel maps.

    An input that was concatenated is kept as its parts, which other layers keep, too.
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
        with without_autocast(x):
            result = forward(backend_for(x), x, weight, bias, keys, settings)
        y, numerator, *small = result
        ctx.settings = settings
        kept = y if numerator is None else numerator
        ctx.save_for_backward(weight, bias, keys, kept, *small, *parts_of(x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, keys, kept, mu, rstd, sums, *parts = ctx.saved_tensors
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        needs = ctx.needs_input_grad[:3]
        with without_autocast(grad):
            if torch.is_grad_enabled():  # this gradient will be differentiated once more
                gradients = _differentiable_backward(grad, x, weight, bias, keys, ctx.settings)
                gradients = tuple(g if n else None for g, n in zip(gradients, needs, strict=True))
            else:
                saved = kept, mu, rstd, sums
                gradients = backward(grad, x, weight, bias, keys, saved, ctx.settings, needs)
        return *gradients, None, None


def _differentiable_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    settings: Settings,
) -> tuple[Tensor | None, ...]:
    """The same gradients, from operations that autograd can differentiate."""
    inputs = [x, weight] if bias is None else [x, weight, bias]

    def output(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return forward(eager, x, weight, bias, keys, settings).y

    gradients = *torch.func.vjp(output, *inputs)[1](grad), None
    return gradients[:3]


def _sum_filters(filters: Tensor, dtype: torch.dtype) -> Tensor:
    return filters.sum(tuple(range(1, filters.dim())), dtype=dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast changes no dtypes."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


# The operator that compilers and dispatch modes see. It changes none of its arguments.

_Options = tuple[list[int], list[int], list[int], list[int], int, float, bool, float, bool]


def _flat(settings: Settings) -> _Options:
    """The settings as an operator's schema can have them."""
    size, stride, padding, dilation = map(list, settings.geometry)
    return size, stride, padding, dilation, *settings[1:]


def _settings(*options: Any) -> Settings:
    """The reverse of :func:`_flat`."""
    return Settings(Geometry(*map(tuple, options[:4])), *options[4:])


@torch.library.custom_op("kernelnorm::kn_conv", mutates_args=())
def _kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    p: float,
    masked: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = _settings(kernel_size, stride, padding, dilation, groups, p, masked, eps, relu)
    with without_autocast(x):
        y, numerator, *rest = forward(backend_for(x), x, weight, bias, keys, settings)
    mu, rstd, sums = rest
    return y, y.new_empty(0) if numerator is None else numerator, mu, rstd, sums


@_kn_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, keys: Any, *options: Any) -> tuple[Tensor, ...]:
    settings = _settings(*options)
    y = eager.convolution(x, weight.to(x.dtype), settings)
    numerator = y.new_empty(0) if settings.relu else torch.empty_like(y)
    mu = y.new_empty((len(y), 1, *y.shape[2:]), dtype=compute_dtype(x))
    return y, numerator, mu, torch.empty_like(mu), mu.new_empty(len(weight))


@torch.library.custom_op("kernelnorm::kn_conv_backward", mutates_args=())
def _kn_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    p: float,
    masked: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = _settings(kernel_size, stride, padding, dilation, groups, p, masked, eps, relu)
    with without_autocast(x):
        gradients = backward(grad, x, weight, bias, keys, saved, settings, needs)
    of_x, of_weight, of_bias = (grad.new_empty(0) if g is None else g for g in gradients)
    return of_x, of_weight, of_bias


@_kn_conv_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Any, keys: Any, saved: Any, needs: Any, *_: Any
) -> tuple[Tensor, ...]:
    inputs = zip((x, weight, bias), needs, strict=True)
    return tuple(torch.empty_like(t) if need else grad.new_empty(0) for t, need in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, keys, *options = inputs
    y, numerator, *rest = output
    ctx.options = options
    ctx.mark_non_differentiable(numerator, *rest)
    ctx.set_materialize_grads(False)
    kept = y if _settings(*options).relu else numerator
    ctx.save_for_backward(x, weight, bias, keys, kept, *rest)


def _operator_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    x, weight, bias, keys, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.kernelnorm.kn_conv_backward(
        grad, x, weight, bias, keys, saved, list(needs), *ctx.options
    )
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return *wanted, *[None] * 10


_kn_conv.register_autograd(_operator_backward, setup_context=_setup_context)
