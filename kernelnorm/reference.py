"""Equations 1 to 4 of the paper, word for word: the oracle of the tests.

Slow and memory-hungry on purpose: every window is copied out, normalised on its own and only then
convolved. Nothing here shares code with the layers.

Source: Nasirigerdeh et al., "Kernel Normalized Convolutional Networks", Section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["kernel_norm", "kn_conv", "windows"]


def windows(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Every window of the zero-padded input.

    Shape:
        - Input: :math:`(N, C, L_1, ..., L_d)`
        - Output: :math:`(N, P_1, ..., P_d, C, k_1, ..., k_d)`, one window at each position
    """
    d = len(kernel_size)
    x = torch.nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
    for i in range(d):
        reach = dilation[i] * (kernel_size[i] - 1) + 1
        x = x.unfold(2 + i, reach, stride[i])[..., :: dilation[i]]
    return x.permute(0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))


def normalized(u: Tensor, mask: Tensor | None, eps: float, d: int) -> Tensor:
    """Equations 1 to 3: normalise the original units by the statistics of the dropped-out ones."""
    unit = tuple(range(-d - 1, 0))
    dropped = u if mask is None else mask * u  # Eq. 1
    mu = dropped.mean(unit, keepdim=True)  # Eq. 2
    var = ((dropped - mu) ** 2).mean(unit, keepdim=True)
    return (u - mu) / torch.sqrt(var + eps)  # Eq. 3


def kernel_norm(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    mask: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """KernelNorm: the normalised windows, laid side by side.

    Args:
        mask: a factor for each element of each window, in the shape that :func:`windows` returns
            (zero where dropped, :math:`1/(1-p)` elsewhere); ``None`` for no dropout

    Shape:
        - Input: :math:`(N, C, L_1, ..., L_d)`
        - Output: :math:`(N, C, k_1 P_1, ..., k_d P_d)`
    """
    d = len(kernel_size)
    u = normalized(windows(x, kernel_size, stride, padding, [1] * d), mask, eps, d)
    pairs = [axis for i in range(d) for axis in (1 + i, 2 + d + i)]
    u = u.permute(0, 1 + d, *pairs)
    return u.reshape(*u.shape[:2], *(u.shape[2 + 2 * i] * kernel_size[i] for i in range(d)))


def kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mask: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """KNConv by Equation 4: normalise each window, then take its product with each filter.

    Args:
        mask: a factor for each element of the input, in the input's shape (overlapping windows
            share it); ``None`` for no dropout
    """
    kernel_size = weight.shape[2:]
    d = len(kernel_size)
    u = windows(x, kernel_size, stride, padding, dilation)
    m = None if mask is None else windows(mask, kernel_size, stride, padding, dilation)
    u = normalized(u, m, eps, d).flatten(1 + d)  # (N, P_1, ..., P_d, C k_1 ... k_d)
    units, filters = u.chunk(groups, -1), weight.flatten(1).chunk(groups, 0)
    y = torch.cat([unit @ f.t() for unit, f in zip(units, filters, strict=True)], -1)  # Eq. 4
    if bias is not None:
        y = y + bias
    return y.movedim(-1, 1)
