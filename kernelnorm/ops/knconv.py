"""One call of a KNConv: as PyTorch operations, as one operator, or as an autograd function.

Functional transforms and exporters get PyTorch operations. Compilers and dispatch modes get one
operator, ``kernelnorm::kn_conv``. All other calls get an autograd function that calls the backend
directly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from kernelnorm.ops import differentiable, observers, operators
from kernelnorm.ops.backends import eager
from kernelnorm.ops.concatenation import parts_of
from kernelnorm.ops.observers import without_autocast
from kernelnorm.ops.passes import backward, forward
from kernelnorm.ops.settings import Settings


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
            return forward(x, weight, bias, keys, settings, eager).y
    if observers.is_observed():
        if not torch.compiler.is_compiling():  # then the operator checks
            observers.refuse_tangents(x, weight, bias)
        return operators.kn_conv(x, weight, bias, keys, settings)
    y: Tensor = _KNConv.apply(x, weight, bias, keys, settings)  # type: ignore[no-untyped-call]
    return y


class Call(NamedTuple):
    """The tensors and settings that a call keeps for its backward pass.

    ``kept`` is the numerator or, with an activation, the output; the input is the concatenation of
    ``parts``.
    """

    kept: Tensor
    mu: Tensor
    rstd: Tensor
    parts: tuple[Tensor, ...]
    settings: Settings


def node_behind(y: Tensor, *parameters: Tensor | None) -> Any:
    """The autograd node of the KNConv that has one of these parameters and led to ``y``.

    ``None`` if there is none: compiled calls and functional transforms have other nodes. Further
    nodes may lie between this node and ``y``, such as that of an activation. Until the backward
    pass, :func:`call_at` returns the tensors of the node, and its attribute ``receive`` can be set
    to a :data:`~kernelnorm.ops.passes.Receiver`: then the parameters get no gradients.
    """
    found, nodes = {y.grad_fn}, [y.grad_fn]
    for node in nodes:  # in breadth-first order: the list grows
        others = [] if node is None else [other for other, _ in node.next_functions]
        if isinstance(getattr(node, "settings", None), Settings):
            variables = [getattr(other, "variable", None) for other in others]
            if any(p is v for p in parameters for v in variables if v is not None):
                return node
        nodes += [other for other in others if other not in found]
        found.update(others)
    return None


def call_at(node: Any) -> Call:
    """The call that made a node, see :func:`node_behind`."""
    *parts, _, _, _, kept, mu, rstd, _ = node.saved_tensors
    kept, mu, rstd, *parts = (tensor.detach() for tensor in (kept, mu, rstd, *parts))
    return Call(kept, mu, rstd, tuple(parts), node.settings)


class _KNConv(torch.autograd.Function):
    """For the backward, keeps the input, the output or numerator, and two one-channel maps.

    A concatenated input is kept as its parts, which other layers keep, too.
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
            result = forward(x, weight, bias, keys, settings)
        y, numerator, *small = result
        ctx.settings, ctx.receive = settings, None
        kept = y if numerator is None else numerator
        parts = parts_of(x)
        ctx.concatenation = TensorWeakRef(x) if len(parts) > 1 else None
        ctx.save_for_backward(*parts, weight, bias, keys, kept, *small)  # x first, as the operator
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *parts, weight, bias, keys, kept, mu, rstd, sums = ctx.saved_tensors
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        needs = ctx.needs_input_grad[:3]
        with without_autocast(grad):
            # With grad enabled, this gradient will be differentiated once more.
            if torch.is_grad_enabled() and ctx.receive is None:
                concatenation = ctx.concatenation and ctx.concatenation()
                if concatenation is not None and len(parts_of(concatenation)) > 1:
                    x = concatenation  # a second derivative may be with respect to this tensor
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
    """The gradients of the backward pass, by operations that autograd can differentiate."""
    inputs = [x, weight] if bias is None else [x, weight, bias]

    def output(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return forward(x, weight, bias, keys, settings, eager).y

    return (*differentiable.gradients(output, inputs, grad), None)[:3]
