"""Adaptive gradient clipping, which normalizer-free networks need for large learning rates."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["adaptive_clip_grad_", "clipped_parameters"]


def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3
) -> None:
    r"""Scale down, in place, gradients that are large beside their parameters.

    The gradient :math:`G` of each unit :math:`W` becomes

    .. math::
        G \leftarrow \lambda \frac{\max(\|W\|, \epsilon)}{\|G\|} G \quad \text{where} \quad
        \|G\| > \lambda \max(\|W\|, \epsilon)

    The weights of each output of a linear layer or a convolution are one unit (of a transposed
    convolution, those of each input). A bias, a gain or
    another parameter with at most one dimension larger than 1 is one unit as a whole. Call it after
    the backward pass and before the step of the optimizer, on gradients that are reduced over all
    processes and not scaled.

    Source: A. Brock et al., "High-Performance Large-Scale Image Recognition Without
    Normalization", ICML 2021.

    Args:
        parameters: a parameter, or several, whose gradients are clipped. The authors leave out the
            last linear layer, as :func:`clipped_parameters` does
        clip_factor: :math:`\lambda`. The authors' 0.01 is for batches of 4096 images; smaller
            batches allow larger factors
        eps: smaller norms :math:`\|W\|` count as this, so that parameters that start as zeros can
            grow

    Raises:
        ValueError: if ``clip_factor`` or ``eps`` is not a positive number.
        TypeError: if ``parameters`` contains anything but tensors.

    Example::

        >>> weight = torch.ones(1, 4, requires_grad=True)
        >>> (100 * weight).sum().backward()
        >>> adaptive_clip_grad_([weight], clip_factor=0.01)
        >>> weight.grad.norm() / weight.norm()
        tensor(0.0100, grad_fn=<DivBackward0>)
    """
    for name, value in (("clip_factor", clip_factor), ("eps", eps)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, got {value}")
    parameters = [parameters] if isinstance(parameters, Tensor) else [*parameters]
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters must be tensors, got {type(parameter).__name__}")
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is None:
                continue
            largest = clip_factor * _unit_norm(parameter).clamp(min=eps)
            norm = _unit_norm(parameter.grad)
            # Where the norm is 0, the factor is 1.
            factor = torch.where(norm > largest, largest / norm, torch.ones_like(norm))
            parameter.grad.mul_(factor.to(parameter.grad.dtype))


def _unit_norm(x: Tensor) -> Tensor:
    """Return the norm of each unit, in float32 or more, in a shape that broadcasts."""
    vector = x.squeeze().dim() <= 1
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    return (squares.sum() if vector else squares.sum(tuple(range(1, x.dim())), True)).sqrt()


def clipped_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters whose gradients are clipped: all but the last linear layer's.

    Example::

        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [tuple(p.shape) for p in clipped_parameters(network)]
        [(8, 4), (8,)]
    """
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    last = {id(parameter) for module in linear[-1:] for parameter in module.parameters()}
    return [parameter for parameter in network.parameters() if id(parameter) not in last]
