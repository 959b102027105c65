"""Convolutions on a CPU: oneDNN's, but products of matrices for few windows and many weights.

At the end of a network, with two images a batch, there are a few dozen windows for millions of
weights. Convolutions are not made for that, and each pass over the weights takes as long as
anything else. Unfolded, the windows are small beside the filters, and they are centred before the
product, so that their mean needs no pass over the gradient.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernelnorm.ops.backends import eager
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry

_MOST_WINDOWS = 64
_LEAST_WEIGHTS = 1 << 19

convolution = eager.convolution


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    filters: Tensor,
    mu: Tensor,
    grad_sums: Tensor,
    settings: Settings,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`kernelnorm.ops.backends.eager.convolution_backward`."""
    few = needs[1] and product_is_faster(filters, mu.numel(), settings.groups)
    by_convolution = needs[0], needs[1] and not few
    grad_x, grad_filters = eager.convolution_backward(
        grad, x, filters, mu, grad_sums, settings, by_convolution
    )
    if few:
        grad_filters = weight_gradient(grad, x, mu, settings.geometry)
    return grad_x, grad_filters


def product_is_faster(filters: Tensor, windows: int, groups: int) -> bool:
    """True if :func:`weight_gradient` takes less time than a convolution."""
    return windows <= _MOST_WINDOWS and filters.numel() >= _LEAST_WEIGHTS and groups == 1


def weight_gradient(grad: Tensor, x: Tensor, mu: Tensor, geometry: Geometry) -> Tensor:
    r"""The sum over all windows :math:`u` of :math:`\text{grad}_k (u - \mu)`, as one product.

    Shape:
        - grad: :math:`(N, K, P_1, ..., P_d)`, x: :math:`(N, C, L_1, ..., L_d)`,
          mu: :math:`(N, 1, P_1, ..., P_d)`
        - Output: :math:`(K, C, k_1, ..., k_d)`, with the strides of ``channels_last``
    """
    d = len(geometry.kernel_size)
    u = F.pad(x.movedim(1, -1), [0, 0, *(p for p in reversed(geometry.padding) for _ in range(2))])
    for i, (stride, dilation) in enumerate(zip(geometry.stride, geometry.dilation, strict=True)):
        u = u.unfold(1 + i, geometry.reach(i), stride)[..., ::dilation]
    # (N, P_1, ..., P_d, C, k_1, ..., k_d), centred in mu's dtype with the channels last
    u = u.movedim(1 + d, -1) - mu.movedim(1, -1)[(..., *[None] * d)]
    rows = grad.movedim(1, -1).flatten(0, -2).to(u.dtype)
    gradient = rows.t() @ u.flatten(0, d).flatten(1)
    return gradient.view(-1, *geometry.kernel_size, x.shape[1]).movedim(-1, 1)
