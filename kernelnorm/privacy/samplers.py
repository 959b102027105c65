"""Opacus' samplers for KNConv: gradients and norms of gradients for each sample.

Opacus gives a sampler the input of the layer and the gradient of its output. The sampler also needs
the dropout mask of the forward pass, since another mask gives other gradients. So the tensors that
the forward pass saved for its own backward pass are taken from autograd's graph. They are stored
next to the input that Opacus keeps, and are released with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import (
    AbstractGradSampleHooks,
    register_grad_sampler,
    register_norm_sampler,
)
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kernelnorm.modules import KNConv1d, KNConv2d, KNConv3d
from kernelnorm.ops.knconv import Call, call_at, node_behind
from kernelnorm.privacy import gradients
from kernelnorm.privacy.product import Product

__all__ = ["with_call"]

KNConv = KNConv1d | KNConv2d | KNConv3d
KNCONVS = [KNConv1d, KNConv2d, KNConv3d]


class Memory:
    """A call of a layer, stored next to the input that Opacus keeps of this call.

    Args:
        layer: the layer
        output: its output
        owner: the Opacus module that registered hooks on the layer
    """

    def __init__(self, layer: KNConv, output: Tensor, owner: Any) -> None:
        node = node_behind(output, layer.weight, layer.bias)
        if node is None:
            raise RuntimeError(
                f"private training cannot find {layer} in autograd's graph of its output: compiled "
                "layers and functional transforms are not supported"
            )
        self.call: Call = call_at(node)
        self._owner = owner
        # Opacus multiplies gradients by this factor before it calls a sampler.
        self._factor = len(output) if owner.loss_reduction == "mean" else 1
        self._gradient: Tensor | None = None
        self._edges: tuple[GradientEdge, GradientEdge] | None = None
        if output.grad_fn is not node:
            assert output.grad_fn is not None
            self._edges = GradientEdge(output.grad_fn, output.output_nr), GradientEdge(node, 0)
            memory = weakref.ref(self)  # since self holds the node

            def receive(gradients: tuple[Tensor, ...]) -> None:
                self = memory()
                if self is not None:
                    self._gradient = gradients[0].detach()

            node.register_prehook(receive)

    def gradient_of_output(self, gradient: Tensor) -> Tensor:
        """The gradient before the activation, given the gradient of the layer's output.

        The two differ if the activation is a module. Usually the backward pass has computed the
        gradient before the activation already. If the layer's input needs no gradient, Opacus calls
        the sampler earlier, and the gradient is computed here.
        """
        if self._edges is None:
            return gradient
        if self._gradient is not None:
            return self._gradient * self._factor
        output, own = self._edges
        self._owner.disable_hooks()  # an activation with parameters runs its own later
        try:
            (result,) = torch.autograd.grad([output], [own], [gradient], retain_graph=True)
        finally:
            self._owner.enable_hooks()
        return result


def with_call(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Extend a forward hook of Opacus to keep a KNConv's call; return other hooks unchanged."""
    owner = getattr(hook, "__self__", None)
    if not isinstance(owner, AbstractGradSampleHooks) or getattr(owner, "force_functorch", False):
        return hook
    return _WithCall(hook, owner)


class _WithCall:
    def __init__(self, hook: Callable[..., Any], owner: AbstractGradSampleHooks) -> None:
        self.hook, self.owner = hook, owner

    def __call__(self, layer: KNConv, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        before = len(getattr(layer, "activations", ()))
        self.hook(layer, inputs, output)
        kept: list[list[Any]] = getattr(layer, "activations", [])
        if len(kept) == before or type(layer) not in KNCONVS:
            return  # no gradients are needed, or Opacus handles a subclass by functorch
        if not self.owner.batch_first or inputs[0].dim() != layer.weight.dim():
            raise ValueError(
                f"private training needs batch_first=True and a batch, got batch_first="
                f"{self.owner.batch_first} and an input of shape {tuple(inputs[0].shape)}"
            )
        # The input stays the last item: Opacus reads the batch size from it.
        kept[-1].insert(0, Memory(layer, output, self.owner))


@register_grad_sampler(KNCONVS)  # type: ignore[untyped-decorator]
def grad_samples(layer: KNConv, activations: list[Any], backprops: Tensor) -> dict[Tensor, Tensor]:
    """The gradient of each parameter for each sample, shape :math:`(N, *)`."""
    product, before_activation = _gradients(activations, backprops)
    result: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        result[layer.weight] = gradients.per_sample(product)
    if layer.bias is not None and layer.bias.requires_grad:
        result[layer.bias] = before_activation.flatten(2).sum(2)
    return result


@register_norm_sampler(KNCONVS)  # type: ignore[untyped-decorator]
def norm_samples(layer: KNConv, activations: list[Any], backprops: Tensor) -> dict[Tensor, Tensor]:
    """The norm of each parameter's gradient for each sample, shape :math:`(N,)`."""
    product, before_activation = _gradients(activations, backprops)
    result: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        result[layer.weight] = gradients.squared_norms(product).sqrt()
    if layer.bias is not None and layer.bias.requires_grad:
        result[layer.bias] = torch.linalg.vector_norm(before_activation.flatten(2).sum(2), dim=1)
    return result


def _gradients(activations: list[Any], backprops: Tensor) -> tuple[Product, Tensor]:
    """The weight's gradient as a product, and the gradient before the fused activation."""
    memory: Memory = activations[0]
    kept, mu, rstd, parts, settings = memory.call
    gradient = memory.gradient_of_output(backprops).to(rstd.dtype)
    if settings.slope is not None:
        gradient = torch.where(kept <= 0, gradient * settings.slope, gradient)
    x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    z = (gradient * rstd).to(x.dtype)
    sums = gradients.per_filter(z, mu).squeeze(2)
    return Product(x, z, settings, mu, sums), gradient
