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

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

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

    ``numerator`` is ``None`` with an activation, since the backward pass can tell it from ``y``.
    Without one the caller may change ``y`` in place, as a residual addition does.
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
    # A mask moves mu by far more than rounding does, and the variance that stands for it in
    # evaluation keeps |mu| rstd small. Otherwise <u, W> - mu S can be the difference of two large
    # numbers, unless the filters are centred; what rounding leaves of their sums is subtracted.
    exact = x.dtype == dtype and (settings.masked or settings.p >= _LEAST_P)
    apart = settings.masked or settings.groups > 1  # a filter's mean then meets another than mu
    centred = not exact or (backend.centres_filters and not apart)
    statistics = backend.window_statistics(x, keys, settings, centred and apart)
    elements = tuple(range(1, weight.dim()))
    if centred:
        means = weight.mean(elements, keepdim=True, dtype=dtype)
        sums = means.flatten() * weight[0].numel()
        filters = (weight - means).to(x.dtype)
        terms = [] if exact else [(statistics.mu, filters.sum(elements, dtype=dtype))]
        if statistics.offset is not None and statistics.means is not None:
            terms = [(statistics.offset, sums), (statistics.means, terms[0][1])]
    else:
        sums = weight.sum(elements, dtype=dtype)
        filters, terms = weight, [(statistics.mu, sums)]
    z = backend.convolution(x, filters, settings)
    y, numerator = backend.epilogue(z, terms, statistics.rstd, bias, settings.slope)
    return Forward(y, numerator, statistics.mu, statistics.rstd, sums)


Receiver = Callable[[Tensor, Tensor, Tensor, Tensor, Settings], None]
r"""Takes the input, the numerator's gradient, mu, rstd and the settings of a call in its backward.

The weight's gradient is the sum over all windows :math:`u` of
:math:`\text{grad\_z}_k (u - \mu)`, that of the bias the sum of
:math:`\text{grad\_z}_k / \text{rstd}`; private training needs these for each sample.
"""


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    saved: Sequence[Tensor],
    settings: Settings,
    needs: Sequence[bool],
    receive: Receiver | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the input, the weight and the bias, each ``None`` if not needed.

    Args:
        saved: the numerator or, with an activation, the output; then mu, rstd and filter sums
        receive: called with what the gradients of the parameters are formed from, in their stead
    """
    kept, mu, rstd, sums = saved
    needs_x, needs_weight, needs_bias = needs
    backend = backend_for(x) if observers.has_storage(grad) else eager
    factors = constants(settings, x.shape[1])
    grad_z, pair, grad_bias, grad_sums = backend.epilogue_backward(
        grad, kept, Statistics(mu, rstd), sums, bias, settings.slope,
        (factors.grad_mean, factors.grad_var),
    )  # fmt: skip
    if receive is not None:
        receive(x, grad_z, mu, rstd, settings)
        needs_weight = needs_bias = False
        if not needs_x:
            return None, None, None
    filters = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    grad_x, grad_weight = backend.convolution_backward(
        grad_z, x, filters, mu, grad_sums, settings, (needs_x, needs_weight)
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


class Call(NamedTuple):
    """What a call keeps for its backward pass.

    ``kept`` is the numerator or, with an activation, the output; the input is the concatenation of
    ``parts``.
    """

    kept: Tensor
    mu: Tensor
    rstd: Tensor
    parts: tuple[Tensor, ...]
    settings: Settings


def node_behind(y: Tensor, *parameters: Tensor | None) -> Any:
    """The node of autograd's graph at which a KNConv with one of these parameters left ``y``.

    ``None`` if there is none: compiled calls and functional transforms leave other nodes. Between
    the node and ``y`` may be others, as of an activation. Until the backward pass,
    :func:`call_at` tells what the node keeps, and its attribute ``receive`` can be set to a
    :data:`Receiver`: then the parameters get no gradients.
    """
    found, nodes = {y.grad_fn}, [y.grad_fn]
    for node in nodes:
        others = [] if node is None else [other for other, _ in node.next_functions]
        if isinstance(getattr(node, "settings", None), Settings):
            variables = [getattr(other, "variable", None) for other in others]
            if any(p is v for p in parameters for v in variables if v is not None):
                return node
        nodes += [other for other in others if other not in found]
        found.update(others)
    return None


def call_at(node: Any) -> Call:
    """The call that left a node, see :func:`node_behind`."""
    _, _, _, *tensors = node.saved_tensors
    kept, mu, rstd, _, *parts = (tensor.detach() for tensor in tensors)
    return Call(kept, mu, rstd, tuple(parts), node.settings)


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
        ctx.settings, ctx.receive = settings, None
        kept = y if numerator is None else numerator
        parts = parts_of(x)
        ctx.concatenation = TensorWeakRef(x) if len(parts) > 1 else None
        ctx.save_for_backward(weight, bias, keys, kept, *small, *parts)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, keys, kept, mu, rstd, sums, *parts = ctx.saved_tensors
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        needs = ctx.needs_input_grad[:3]
        with without_autocast(grad):
            # With grad enabled, this gradient will be differentiated once more.
            if torch.is_grad_enabled() and ctx.receive is None:
                concatenation = ctx.concatenation and ctx.concatenation()
                if concatenation is not None and len(parts_of(concatenation)) > 1:
                    x = concatenation  # with respect to which it may be differentiated
                gradients = _differentiable_backward(grad, x, weight, bias, keys, ctx.settings)
                gradients = tuple(g if n else None for g, n in zip(gradients, needs, strict=True))
            else:
                saved, options = (kept, mu, rstd, sums), (ctx.settings, needs, ctx.receive)
                gradients = backward(grad, x, weight, bias, keys, saved, *options)
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


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast changes no dtypes."""
    if observers.is_autocast_on(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


# The operators that compilers and dispatch modes see. They change none of their arguments.

_OPTIONS = (
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "float p, bool masked, float eps, bool activation, float slope"
)


def _flat(settings: Settings) -> tuple[Any, ...]:
    """The settings as the schema of an operator has them."""
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
    with without_autocast(x):
        result = forward(backend_for(x), x, weight, bias, keys, _settings(options))
    y, numerator, *rest = result
    return y, y.new_empty(0) if numerator is None else numerator, *rest


@_kn_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, keys: Any, *options: Any) -> tuple[Tensor, ...]:
    settings = _settings(options)
    y = eager.convolution(x, weight.to(x.dtype), settings)
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
        return (None,) * 14
    *inputs, kept, mu, rstd, sums = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:3]]
    gradients = torch.ops.kernelnorm.kn_conv_backward(
        grad, *inputs, [kept, mu, rstd, sums], needs, *_flat(ctx.settings)
    )
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return *wanted, *[None] * 11


_kn_conv.register_autograd(_operator_backward, setup_context=_setup_context)
