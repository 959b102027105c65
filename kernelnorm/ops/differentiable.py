"""Gradients that autograd can differentiate once more, for ``create_graph=True``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernelnorm.ops import observers


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the inputs, from the gradient of ``function(*inputs)``."""
    if not observers.has_storage(grad):  # a batch of gradients
        of_inputs: tuple[Tensor, ...] = torch.func.vjp(function, *inputs)[1](grad)
        return of_inputs
    # Not vjp: it fails while saved tensors have hooks, as in activation checkpointing.
    aliases = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*aliases), aliases, grad, create_graph=True)
