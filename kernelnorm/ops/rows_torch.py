"""The row primitives in PyTorch operations, for every device and dtype.

A row is the channels of one pixel. Each primitive reads the large tensors once in principle; run
one by one, its operations read them a few times. *Maps* have one value for each pixel,
:math:`(N, 1, *)`; *pairs* are two maps, :math:`(2, N, 1, *)`; *vectors* have one
value for each output channel, :math:`(K,)`. All of it is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelnorm.ops.mask import Keys, keep


def narrow(x: Tensor) -> torch.dtype:
    """The dtype of sums over the channels of ``x``, and of all that has its size."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums over windows: maps are small, and the variance is a difference."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def statistics(x: Tensor, keys: Keys | None) -> Tensor:
    r"""Mean and mean square over the channels of each pixel: a pair.

    .. math::
        \text{mean} = \frac1C \sum_c m_c x_c \qquad
        \text{square} = \frac1C \sum_c m_c x_c^2

    What is summed are the differences to the pixel's first channel, and the sums are put together
    in the dtype of :func:`wide`: nothing is lost where the mean is large beside the deviation.

    Args:
        keys: of the mask of zeros and ones; ``None`` for no mask, :math:`m = 1`

    Shape:
        - x: :math:`(N, C, *)`
    """
    x = x.to(narrow(x))
    first = x[:, :1]
    difference = x - first
    first = first.to(wide(x))
    shift = first
    if keys is not None:
        mask = keep(keys, x.dtype)
        difference = difference * mask
        shift = first * mask.mean(1, keepdim=True).to(wide(x))
    mean = difference.mean(1, keepdim=True).to(wide(x))
    square = difference.square().mean(1, keepdim=True).to(wide(x))
    return torch.stack([mean + shift, square + (2 * mean + shift) * first])


def moments(
    sums: Tensor, factors: tuple[float, float], kappa: float, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    r"""Mean and inverse deviation of the windows: two maps.

    .. math::
        \mu = f_1 \text{sum} \qquad
        V = f_2 \text{squares} - \mu^2 \qquad
        r = (V + \kappa (V + \mu^2) + \epsilon)^{-1/2}

    Args:
        sums: of the pixels' means and mean squares: a pair
        factors: :math:`f_1` and :math:`f_2`
        dtype: of the maps
    """
    mean, square = sums[0] * factors[0], sums[1] * factors[1]
    var = (square - mean.square()).clamp_min(0)
    var = var + kappa * (var + mean.square())
    return mean.to(dtype), (var + eps).rsqrt().to(dtype)


def epilogue(
    z: Tensor,
    maps: list[Tensor],
    vectors: list[Tensor],
    r: Tensor,
    bias: Tensor | None,
    relu: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""The output from the convolution's result, and the numerator if there is no ReLU.

    .. math::
        \text{numerator}_k = z_k - \sum_i \text{maps}_i \text{vectors}_{i,k} \qquad
        y_k = \text{act}(\text{numerator}_k r + b_k)

    A map may have one channel for each group instead of one for all. Other backends overwrite
    ``z``.

    Args:
        into: where the output is written to, if anywhere

    Shape:
        - z, into, y, numerator: :math:`(N, K, *)`
    """
    numerator = z
    for m, v in zip(maps, vectors, strict=True):
        if m.shape[1] > 1:
            m = m.repeat_interleave(z.shape[1] // m.shape[1], 1)
        numerator = torch.addcmul(numerator, m, _as_channels(v, z), value=-1)
    if bias is None:
        y = numerator * r
    else:
        y = torch.addcmul(_as_channels(bias, z).to(r.dtype), numerator, r)
    if relu:
        y = y.relu_()
    y = y.to(z.dtype) if into is None else into.copy_(y)
    return y, None if relu else numerator.to(z.dtype)


def output_gradient(
    grad: Tensor,
    kept: Tensor,
    r: Tensor,
    mu: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    relu: bool,
    factors: tuple[float | Tensor, float | Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The gradient of the convolution's result, and what is summed over it.

    With :math:`g` the gradient where the ReLU was on and zero where it was off:

    .. math::
        \text{grad\_z} = g r \quad
        \text{grad\_r} = \sum_k g_k \, \text{numerator}_k \quad
        \text{grad\_bias}_k = \sum g_k \quad
        \text{grad\_sums}_k = \sum g_k r \mu

    Args:
        kept: the numerator; with a ReLU the output :math:`y` instead, as where :math:`g` is not
            zero the numerator is :math:`(y - b) / r`
        factors: :math:`f_1` and :math:`f_2`, of the pair

    Returns:
        ``grad_z``, a pair, ``grad_bias``, and what is to be subtracted from the gradient of each
        weight. The pair has the gradient of the
        windows' mean times :math:`f_1`, and that of their variance times :math:`f_2`.

    Shape:
        - grad, kept, grad_z: :math:`(N, K, *)`
        - r, mu: maps
        - sums, bias, grad_bias, grad_sums: vectors
    """
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, kept, 0)
    g = grad.to(r.dtype)
    scaled = g * r
    if relu and bias is not None:
        kept = kept - _as_channels(bias, kept).to(r.dtype)
    # With a ReLU, what is kept is the numerator times r.
    product = (scaled * kept).sum(1, keepdim=True)
    grad_var = -0.5 * r * (product if relu else product * r)
    grad_mean = -_dot(scaled, sums) - 2 * mu * grad_var
    pair = torch.stack([grad_mean * factors[0], grad_var * factors[1]])
    grad_z = scaled.to(grad.dtype)
    others = [0, *range(2, grad.dim())]
    # As the convolution has it, for its gradient of the weights and this one are subtracted.
    return grad_z, pair, g.sum(others), (grad_z * mu).sum(others)


def input_gradient(grad: Tensor, x: Tensor, pair: Tensor, keys: Keys | None) -> Tensor:
    r"""Adds the gradient that comes through the statistics to the convolution's input gradient.

    .. math:: \text{grad} + m (a + b x)

    Other backends overwrite ``grad``.

    Args:
        pair: :math:`a` and :math:`b`
        keys: of the mask of zeros and ones; ``None`` for no mask, :math:`m = 1`

    Shape:
        - grad, x, Output: :math:`(N, C, *)`
    """
    through = torch.addcmul(pair[0], pair[1], x)
    if keys is not None:
        through = through.mul_(keep(keys, through.dtype))
    return through.add_(grad).to(x.dtype)


def _dot(x: Tensor, vector: Tensor) -> Tensor:
    """The product of each row with a vector: a map."""
    if torch.compiler.is_compiling():
        return (x * _as_channels(vector, x)).sum(1, keepdim=True)  # becomes a part of a loop
    return (x.movedim(1, -1) @ vector.to(x.dtype)).unsqueeze(1)


def _as_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 2))
