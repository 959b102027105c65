"""The two ways in which a tensor of pixels and channels lies in memory, as two or three dimensions.

*Rows*, :math:`(P, C)`: the channels of a pixel lie side by side, as in ``channels_last``. From one
pixel to the next there may be more than :math:`C` elements. *Planes*, :math:`(N, C, L)`: the pixels
of a channel lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Layout = Literal["rows", "planes"]


def layout_of(x: Tensor) -> Layout | None:
    """That of a tensor of shape :math:`(N, C, *)`; ``None`` for any other."""
    sizes, strides = x.shape[2:], x.stride()[2:]
    if x.stride(1) == 1 and _collapses((len(x), *sizes), (x.stride(0), *strides)):
        return "rows"
    if _collapses(sizes, strides):
        return "planes"
    return None


def flat(x: Tensor, layout: Layout) -> Tensor:
    """A view of a tensor in its layout."""
    return x.movedim(1, -1).flatten(0, -2) if layout == "rows" else x.flatten(2)


def unflat(x: Tensor, shape: Sequence[int], layout: Layout) -> Tensor:
    """The reverse of :func:`flat`, to a shape of :math:`(N, C, *)`."""
    if layout == "planes":
        return x.view(shape)
    n, channels, *spatial = shape
    return x.view(n, *spatial, channels).movedim(-1, 1)


def flat_map(x: Tensor, layout: Layout) -> Tensor:
    """A map of one channel, :math:`(N, 1, *)`, for tensors in that layout."""
    return x.reshape(-1, 1) if layout == "rows" else x.flatten(2)


def _collapses(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether one stride leads from each element to the next."""
    expected = None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if expected is not None and stride != expected:
                return False
            expected = stride * size
    return True
