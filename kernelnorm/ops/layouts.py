"""How the elements of a tensor of shape :math:`(N, C, *)` lie in memory, as loops on a CPU see it.

In *rows* the channels of a pixel lie side by side, as in ``channels_last``; *slices* are rows, too,
but parts of longer ones; in *planes* the pixels of a channel lie side by side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["rows", "slices", "planes"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(x: Tensor) -> Layout | None:
    """That of a tensor; ``None`` for any other."""
    if is_rows(x):
        return "rows"
    if x.is_contiguous():
        return "planes"
    (_, channels, *sizes), (of_sample, of_channel, *strides) = x.shape, x.stride()
    if not strides or of_channel != 1 or strides[-1] <= channels:
        return None
    reach = strides[-1]
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if stride != reach:
            return None
        reach *= size
    return "slices" if of_sample == reach else None


def is_rows(x: Tensor) -> bool:
    """Whether the tensor lies in rows, or, being small, may be taken to."""
    memory_format = _CHANNELS_LAST.get(x.dim())
    if memory_format is None:
        return x.movedim(1, -1).is_contiguous()
    return x.is_contiguous(memory_format=memory_format)  # in a tenth of the time


def in_rows(x: Tensor) -> Tensor:
    """The tensor in rows, a copy if need be."""
    return x if is_rows(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)
