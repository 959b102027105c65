"""Dropout masks from a seed: the same seed gives the same mask, so that none has to be kept.

A mask is a function of one 64-bit seed and the position of the element, a counter-based generator:
nothing is carried from one element to the next. The backward pass draws the forward's mask again
from the seed, and so do activation checkpointing and a resumed run. The seed itself comes from
PyTorch's generator, so ``torch.manual_seed`` makes everything repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# Odd multipliers with well-mixed bits (the first is 2**64 divided by the golden ratio), as signed
# 64-bit integers; products wrap around.
_STEP = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685

_LANES = 4  # 16-bit random numbers in a 64-bit word
_RESOLUTION = 1 << 16


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from PyTorch's generator for the device: 0-d, int64."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device)


def rounded_p(p: float) -> float:
    """The dropout probability in steps of 1/65536: the one that :func:`keep_mask` has exactly."""
    return min(round(p * _RESOLUTION), _RESOLUTION - 1) / _RESOLUTION


def keep_mask(seed: Tensor, shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """A mask of zeros and ones, zero with probability :func:`rounded_p`.

    The elements are counted with the channels innermost, whatever the memory format of the tensor
    that the mask is for: a network gives the same result in either format.

    Shape:
        - Output: ``shape``, that is :math:`(N, C, *)`, with the strides of ``channels_last``
    """
    n, channels, *spatial = shape
    size = prod(shape)
    counter = torch.arange((size + _LANES - 1) // _LANES, dtype=torch.int64, device=seed.device)
    # The seed comes before the first product: compilers take it that the product of a loop's
    # counter does not overflow, and it does. It goes in twice, or the masks of two seeds could be
    # shifted copies of each other. The last step is a product, not the usual shift: a shift would
    # copy the sign into the top lane. Its low lanes are as good as the high ones, for the shift
    # before it mixed them.
    word = (counter + seed).mul_(_STEP)
    word = word.bitwise_xor_(word >> 32).mul_(_MIX_1).add_(seed * _STEP)
    word = word.bitwise_xor_(word >> 29).mul_(_MIX_2)
    lanes = word.view(torch.int16)[:size]
    # A comparison, in three operations that are a tenth of its time on a CPU.
    first_kept = round(rounded_p(p) * _RESOLUTION) - _RESOLUTION // 2
    keep = (lanes.clamp(first_kept - 1, first_kept) - (first_kept - 1)).to(dtype)
    return keep.view(n, *spatial, channels).movedim(-1, 1)
