"""The layers that bookkeeping supports: their backward passes fill the book.

Autograd computes no gradients of their parameters: the sum over the batch is computed once, when
the clipping factor of each sample is known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelnorm import arguments
from kernelnorm.modules import KNConv1d, KNConv2d, KNConv3d
from kernelnorm.norms import WSConv2d
from kernelnorm.ops import observers
from kernelnorm.ops.backends import compute_dtype
from kernelnorm.ops.knconv import node_behind
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry
from kernelnorm.privacy import gradients
from kernelnorm.privacy.book import Book, Entry, Page, Vectors, weight_entry
from kernelnorm.privacy.product import Product, unnormalised
from kernelnorm.privacy.standardised import Standardisation, standardisation

Forward = Callable[[Any, Page, Tensor], Tensor]
"""A forward pass whose backward pass enters the gradients of the layer on a page of the book."""


def kn_conv(layer: KNConv1d | KNConv2d | KNConv3d, page: Page, input: Tensor) -> Tensor:
    """KNConv: its own backward pass computes what the book needs."""
    _check_batch(layer, input, layer.weight.dim())
    y = type(layer).forward(layer, input)
    node = node_behind(y, layer.weight, layer.bias)
    if node is None:
        raise NotImplementedError(
            f"private training cannot find {layer} in autograd's graph of its output: compiled "
            "layers and functional transforms are not supported"
        )

    def receive(x: Tensor, z: Tensor, mu: Tensor, rstd: Tensor, settings: Settings) -> None:
        sums, of_bias = gradients.per_filter(z, torch.cat([mu, 1 / rstd], 1)).unbind(2)
        _enter(page, layer, Product(x.detach(), z, settings, mu, sums), of_bias)

    node.receive = receive
    return y


def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, page: Page, input: Tensor) -> Tensor:
    """The convolutions of torch.nn."""
    return _convolve(layer, page, input, layer.weight)


def standardised_convolution(layer: WSConv2d, page: Page, input: Tensor) -> Tensor:
    """Weight Standardization: the gradients of the filters go back through the standardisation."""
    standardised = standardisation(layer)
    filters = standardised.filters.to(layer.weight.dtype).detach()
    filters.requires_grad_(layer.weight.requires_grad)
    return _convolve(layer, page, input, filters, standardised)


def _convolve(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    page: Page,
    input: Tensor,
    filters: Tensor,
    standardised: Standardisation | None = None,
) -> Tensor:
    _check_batch(layer, input, layer.weight.dim())
    geometry = arguments.geometry(
        input.dim() - 2, layer.kernel_size, layer.stride, layer.padding, layer.dilation
    )
    sides, geometry = arguments.pad_first(geometry, layer.padding, layer.padding_mode)
    if sides:
        input = F.pad(input, sides, arguments.PADDING_MODES[layer.padding_mode])
    settings = unnormalised(geometry, layer.groups)

    def receive(x: Tensor, z: Tensor) -> None:
        _enter(page, layer, Product(x, z, settings), standardised=standardised)

    options = geometry, layer.groups, receive
    y: Tensor = _Convolution.apply(input, filters, layer.bias, *options)  # type: ignore[no-untyped-call]
    return y


def linear(layer: nn.Linear, page: Page, input: Tensor) -> Tensor:
    """Linear; dimensions between the first and the last are positions."""
    _check_batch(layer, input, max(2, input.dim()))

    def receive(x: Tensor, z: Tensor) -> None:
        x, z = (t.flatten(1, -2).mT if t.dim() > 2 else t.unsqueeze(2) for t in (x, z))
        _enter(page, layer, Product(x, z, _LINEAR))

    y: Tensor = _Linear.apply(input, layer.weight, layer.bias, receive)  # type: ignore[no-untyped-call]
    return y


def group_norm(layer: nn.GroupNorm, page: Page, input: Tensor) -> Tensor:
    """GroupNorm with weight and bias."""

    def receive(of_weight: Tensor, of_bias: Tensor) -> None:
        of = ((layer.weight, of_weight), (layer.bias, of_bias))
        entries: list[Entry] = [
            Vectors({p: gradients.of_samples(g, page.augmentations)})
            for p, g in of
            if p is not None and p.requires_grad
        ]
        page.enter(layer, entries)

    x = F.group_norm(input, layer.num_groups, None, None, layer.eps)
    y: Tensor = _Affine.apply(x, layer.weight, layer.bias, receive)  # type: ignore[no-untyped-call]
    return y


_LINEAR = unnormalised(Geometry((1,), (1,), (0,), (1,)), 1)
"""The settings of a linear layer as a 1-d convolution with a kernel size of 1."""

LAYERS: dict[type[nn.Module], Forward] = {
    KNConv1d: kn_conv,
    KNConv2d: kn_conv,
    KNConv3d: kn_conv,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    WSConv2d: standardised_convolution,
    nn.Linear: linear,
    nn.GroupNorm: group_norm,
}
"""The forward passes by exact type: a subclass may compute something else."""


def keep_book(layer: nn.Module, book: Book) -> None:
    """Replace the forward method of a layer by one that fills the book, until ``close_book``."""
    layer.forward = partial(_forward, layer, book)


def close_book(layer: nn.Module) -> None:
    """Restore the forward method of a layer."""
    vars(layer).pop("forward", None)


def _forward(layer: nn.Module, book: Book, input: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        y: Tensor = type(layer).forward(layer, input)
        return y
    page = book.page
    page.call(layer, input)
    return LAYERS[type(layer)](layer, page, input)


def _check_batch(layer: nn.Module, input: Tensor, dims: int) -> None:
    if input.dim() != dims:
        raise ValueError(
            f"private training needs a batch: {dims} dimensions for {layer}, got an input of "
            f"shape {tuple(input.shape)}"
        )


def _enter(
    page: Page,
    layer: Any,
    product: Product,
    of_bias: Tensor | None = None,
    standardised: Standardisation | None = None,
) -> None:
    """Enter the gradients of a convolution or linear layer.

    Args:
        of_bias: the gradients of the bias for each row, shape :math:`(N, K)`. Default: the sums of
            ``product.z``
        standardised: the standardisation, if the filters are not the weight itself
    """
    entries: list[Entry] = []
    if layer.weight.requires_grad:
        product = product._replace(augmentations=page.augmentations)
        entries.append(weight_entry(layer.weight, product, standardised))
    if layer.bias is not None and layer.bias.requires_grad:
        if of_bias is None:
            of_bias = product.z.flatten(2).sum(2, dtype=compute_dtype(product.z))
        of_bias = gradients.of_samples(of_bias, page.augmentations)
        entries.append(Vectors({layer.bias: of_bias}))
    page.enter(layer, entries)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        groups: int,
        receive: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        x, weight = observers.as_autocast(x), observers.as_autocast(weight)
        bias = None if bias is None else observers.as_autocast(bias)
        _, stride, padding, dilation = geometry
        ctx.options = stride, padding, dilation, False, (0,) * len(stride), groups
        ctx.receive = receive
        ctx.save_for_backward(x, weight)
        return torch.convolution(x, weight, bias, *ctx.options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.receive(x.detach(), grad)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        grad_x, *_ = torch.ops.aten.convolution_backward.default(
            grad, x.to(grad.dtype), weight.to(grad.dtype), None, *ctx.options, (True, False, False)
        )
        return grad_x.to(x.dtype), *[None] * 5


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        receive: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.receive = receive
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.receive(x.detach(), grad)
        if not ctx.needs_input_grad[0]:
            return (None,) * 4
        return (grad @ weight.to(grad.dtype)).to(x.dtype), None, None, None


class _Affine(torch.autograd.Function):
    """Scales and shifts each channel; ``receive`` gets both gradients per row, shape (N, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        receive: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.receive = receive
        ctx.save_for_backward(x, weight)
        scale = _per_channel(weight, x)
        return x * scale if bias is None else torch.addcmul(_per_channel(bias, x), x, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtype = compute_dtype(x)
        of_weight, of_bias = (
            t.flatten(2).sum(2) if t.dim() > 2 else t
            for t in (grad.to(dtype) * x.to(dtype), grad.to(dtype))
        )
        ctx.receive(of_weight, of_bias)
        return grad * _per_channel(weight, x) if ctx.needs_input_grad[0] else None, *[None] * 3


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter of shape (C,) in the dtype of ``x`` and a shape that broadcasts with ``x``."""
    return parameter.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))
