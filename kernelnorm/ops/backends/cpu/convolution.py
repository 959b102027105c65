"""Convolutions on a CPU: by oneDNN, or as a matrix product for few windows and many weights.

At the end of a network, with two images per batch, there are a few dozen windows for millions of
weights. Convolution routines are slow there, and each pass over the weights takes as long as the
rest of the call. Unfolded, the windows are small beside the filters. They are centred before the
product, which saves a pass over the gradient to subtract the mean.

For some geometries oneDNN reads and writes outside of its memory: results are wrong, or the process
crashes. In float32 these are windows that see nothing but padding, and slices of one channel of a
``channels_last`` tensor whose output is one pixel wide. In bfloat16, on processors with bfloat16
instructions, there are more. All of them are computed in another way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelnorm.ops.backends import eager
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry

_MOST_WINDOWS = 64
_LEAST_WEIGHTS = 1 << 19


def convolution(x: Tensor, filters: Tensor, settings: Settings) -> Tensor:
    """See :func:`kernelnorm.ops.backends.eager.convolution`."""
    x, dtype = _safe(x, filters, settings.geometry), _safe_dtype(x, filters, settings.geometry)
    return eager.convolution(x.to(dtype), filters.to(dtype), settings).to(x.dtype)


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
    needs_x, needs_filters = needs
    if needs_filters and product_is_faster(filters, mu.numel(), settings.groups):
        grad_x, _ = _backward(grad, x, filters, mu, grad_sums, settings, (needs_x, False))
        return grad_x, weight_gradient(grad, x, mu, settings.geometry)
    return _backward(grad, x, filters, mu, grad_sums, settings, needs)


def _backward(
    grad: Tensor,
    x: Tensor,
    filters: Tensor,
    mu: Tensor,
    grad_sums: Tensor,
    settings: Settings,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by convolutions; avoids oneDNN for geometries that it computes wrongly."""
    rest, needs_x, needs_filters = (mu, grad_sums, settings), *needs
    x, dtype = _safe(x, filters, settings.geometry), _safe_dtype(x, filters, settings.geometry)
    if dtype != x.dtype:
        grad_x, grad_filters = eager.convolution_backward(
            grad.to(dtype), x.to(dtype), filters.to(dtype), *rest, needs
        )
        return None if grad_x is None else grad_x.to(x.dtype), grad_filters
    dilated = max(settings.geometry.dilation[:-1], default=1) > 1
    if needs_filters and dilated and dtype == torch.bfloat16:
        # In channels_last, the gradient of the filters would be wrong.
        grad_x, _ = eager.convolution_backward(grad, x, filters, *rest, (needs_x, False))
        _, grad_filters = eager.convolution_backward(
            grad.contiguous(), x.contiguous(), filters.contiguous(), *rest, (False, True)
        )
        return grad_x, grad_filters
    return eager.convolution_backward(grad, x, filters, *rest, needs)


def _safe_dtype(x: Tensor, filters: Tensor, geometry: Geometry) -> torch.dtype:
    """The dtype of ``x``, or a wider one for geometries that oneDNN computes wrongly.

    PyTorch computes float64 convolutions without oneDNN. For the symbolic sizes of a compiler it is
    the dtype of ``x``; the call itself has numbers.
    """
    if not all(isinstance(size, int) for size in x.shape[2:]):
        return x.dtype
    if has_empty_window(x.shape[2:], geometry):
        return torch.float64
    if x.dtype == torch.bfloat16 and (
        _is_narrow(x, filters, geometry) or sees_only_padding(x.shape[2:], geometry)
    ):
        return torch.float32
    return x.dtype


def _safe(x: Tensor, filters: Tensor, geometry: Geometry) -> Tensor:
    """``x``, or a contiguous copy where oneDNN misreads the strides of a single channel."""
    return x.contiguous() if _is_narrow(x, filters, geometry) else x


def _is_narrow(x: Tensor, filters: Tensor, geometry: Geometry) -> bool:
    """True for filters of one channel whose output is one pixel wide."""
    return filters.shape[1] == 1 and geometry.positions(-1, x.shape[-1]) == 1


@functools.lru_cache(maxsize=4096)
def has_empty_window(sizes: Sequence[int], geometry: Geometry) -> bool:
    """True if there is a window of which all weights see only padding, along some dimension."""
    for i, (size, k, stride, padding, dilation) in enumerate(zip(sizes, *geometry, strict=True)):
        end = geometry.positions(i, size) * stride - padding
        beyond = max(0, (size - geometry.reach(i) + padding) // stride + 1)  # reaches into padding
        at_start = range(-padding, min(0, end), stride)
        at_end = range(beyond * stride - padding, end, stride)
        for start in (*at_start, *at_end):
            weight = max(0, -(start // dilation))  # the first one that is not before the input
            if weight >= k or start + weight * dilation >= size:
                return True
    return False


@functools.lru_cache(maxsize=4096)
def sees_only_padding(sizes: Sequence[int], geometry: Geometry) -> bool:
    """True if a window, or a weight in all windows, sees only padding along some dimension.

    Also true for windows that are larger than the input.
    """
    for i, (size, k, stride, padding, dilation) in enumerate(zip(sizes, *geometry, strict=True)):
        reach, last = geometry.reach(i), (geometry.positions(i, size) - 1) * stride - padding
        if reach > size or padding >= reach or last >= size:
            return True
        for start in range(-padding, k * dilation - padding, dilation):
            # The first pixel that this weight sees at or after the start of the input.
            pixel = start if start >= 0 else start % stride
            if pixel >= size or pixel > start + last + padding:
                return True
    return False


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
    last = torch.empty(grad.shape[1], *geometry.kernel_size, x.shape[1], device="meta")
    gradient = torch.empty_like(last.movedim(-1, 1), dtype=u.dtype, device=u.device)
    torch.mm(rows.t(), u.flatten(0, d).flatten(1), out=gradient.movedim(1, -1).view(len(last), -1))
    return gradient
