"""The filters' gradient as a product of matrices, for layers of few windows and many weights.

At the end of a network, with two images a batch, there are a few dozen windows for millions of
weights. Convolutions are not made for that, and each pass over the weights takes as long as
anything else. Written out, the windows are small beside the filters; they are centred beforehand,
so that their mean needs no pass over the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelnorm.ops.windows import Geometry

_MOST_WINDOWS = 64
_LEAST_WEIGHTS = 1 << 19


def pays(x: Tensor, weight: Tensor, windows: int, groups: int) -> bool:
    """Whether :func:`weight_gradient` is the faster way, on a CPU; not in a trace for any batch."""
    if torch.compiler.is_compiling():
        return False
    few = windows <= _MOST_WINDOWS and weight.numel() >= _LEAST_WEIGHTS
    return few and groups == 1 and x.device.type == "cpu"


def weight_gradient(grad_z: Tensor, x: Tensor, mu: Tensor, geometry: Geometry) -> Tensor:
    r"""The sum over all windows :math:`u` of :math:`\text{grad\_z}_k (u - \mu)`.

    Shape:
        - grad_z: :math:`(N, K, P_1, ..., P_d)`, x: :math:`(N, C, L_1, ..., L_d)`,
          mu: :math:`(N, 1, P_1, ..., P_d)`
        - Output: :math:`(K, C, k_1, ..., k_d)`, with the strides of ``channels_last``
    """
    d = len(geometry.kernel_size)
    u = F.pad(x.movedim(1, -1), [0, 0, *(p for p in reversed(geometry.padding) for _ in range(2))])
    for i, (stride, dilation) in enumerate(zip(geometry.stride, geometry.dilation, strict=True)):
        u = u.unfold(1 + i, geometry.reach(i), stride)[..., ::dilation]
    # (N, P_1, ..., P_d, C, k_1, ..., k_d), centred with the channels last
    u = u.movedim(1 + d, -1) - mu.movedim(1, -1)[(..., *[None] * d)]
    rows = grad_z.movedim(1, -1).flatten(0, -2)
    gradient = rows.t() @ u.flatten(0, d).flatten(1)
    return gradient.view(-1, *geometry.kernel_size, x.shape[1]).movedim(-1, 1)
