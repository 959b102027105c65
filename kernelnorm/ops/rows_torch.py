"""The row primitives in PyTorch operations, for every device and dtype.

A row is the channels of one pixel. Each primitive reads the large tensors once in principle; here
it takes a few operations to do so. *Maps* have one value for each pixel, :math:`(N, 1, *)`;
*vectors* have one value for each output channel, :math:`(K,)`. All of it is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelnorm.ops.mask import keep_mask, rounded_p


def statistics(
    x: Tensor, seed: Tensor | None, p: float, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    r"""Mean and mean square over the channels of each pixel, after dropout.

    .. math::
        \text{mean} = \frac1C \sum_c m_c x_c \qquad
        \text{square} = \frac1C \sum_c (m_c x_c)^2

    Args:
        seed: the mask's seed; ``None`` for no mask, :math:`m = 1`
        wide: dtype of the returned maps. The square is the squared mean, already in this dtype,
            plus the *centred* second moment, so that nothing is lost where the mean is large
            beside the deviation.

    Shape:
        - x: :math:`(N, C, *)`
        - Output: two maps
    """
    x = x.to(_accumulator(x))
    kept = 1.0
    if seed is not None:
        kept = 1 - rounded_p(p)
        x = x * keep_mask(seed, x.shape, p, x.dtype)
    mean = x.mean(1, keepdim=True)
    spread = (x - mean).square().mean(1, keepdim=True).to(wide)
    mean = mean.to(wide)
    return mean / kept, (spread + mean.square()) / kept**2


def epilogue(
    z: Tensor, maps: list[Tensor], vectors: list[Tensor], r: Tensor, bias: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    r"""The output from the convolution's result, and the numerator.

    .. math::
        \text{numerator}_k = z_k + \sum_i \text{maps}_i \text{vectors}_{i,k} \qquad
        y_k = \text{act}(\text{numerator}_k r + b_k)

    A map may have one channel for each group instead of one for all.

    Shape:
        - z, y, numerator: :math:`(N, K, *)`
    """
    numerator = z
    for m, v in zip(maps, vectors, strict=True):
        if m.shape[1] > 1:
            m = m.repeat_interleave(z.shape[1] // m.shape[1], 1)
        numerator = torch.addcmul(numerator, m, _as_channels(v, z))
    if bias is None:
        y = numerator * r
    else:
        y = torch.addcmul(_as_channels(bias, z).to(r.dtype), numerator, r)
    if relu:
        y = y.relu_()
    return y.to(z.dtype), numerator.to(z.dtype)


def output_gradient(
    grad: Tensor, kept: Tensor, r: Tensor, mu: Tensor, sums: Tensor, bias: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""The gradient of the convolution's result, and the reductions of the gradient.

    With :math:`g` the gradient where the ReLU was on and zero where it was off:

    .. math::
        \text{grad\_z} = g r \quad
        \text{grad\_r} = \sum_k g_k \, \text{numerator}_k \quad
        \text{grad\_mu} = - \sum_k g_k r S_k \quad
        \text{grad\_bias}_k = \sum g_k \quad
        \text{grad\_sums}_k = - \sum g_k r \mu

    Args:
        kept: the numerator; with a ReLU the output :math:`y` instead, as where :math:`g` is not
            zero the numerator is :math:`(y - b) / r`

    Shape:
        - grad, kept, grad_z: :math:`(N, K, *)`
        - r, mu, grad_r, grad_mu: maps
        - sums, bias, grad_bias, grad_sums: vectors
    """
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, kept, 0)
    g = grad.to(r.dtype)
    grad_r = (g * kept).sum(1, keepdim=True)
    if relu:
        grad_r = (grad_r if bias is None else grad_r - _dot(g, bias)) / r
    grad_mu = -r * _dot(g, sums)
    others = [0, *range(2, grad.dim())]
    grad_z = (g * r).to(kept.dtype)  # rounded once, for the convolution and for the sum below
    return grad_z, grad_r, grad_mu, g.sum(others), -(grad_z * mu).sum(others)


def input_gradient(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, p: float
) -> Tensor:
    r"""Adds the gradient that comes through the statistics to the convolution's input gradient.

    .. math:: \text{grad} + m (a + b m x)

    Shape:
        - grad, x, Output: :math:`(N, C, *)`
        - a, b: maps
    """
    if seed is None:
        through = torch.addcmul(a, b, x)
    else:
        kept = 1 - rounded_p(p)
        through = torch.addcmul(a / kept, b / kept**2, x)
        through = through.mul_(keep_mask(seed, x.shape, p, through.dtype))
    return through.add_(grad).to(x.dtype)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dot(x: Tensor, vector: Tensor) -> Tensor:
    """The product of each row with a vector: a map."""
    return (x.movedim(1, -1) @ vector.to(x.dtype)).unsqueeze(1)


def _as_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 2))
