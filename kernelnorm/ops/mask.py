"""Dropout masks from keys: the same keys give the same mask, so that no mask has to be kept.

Each sample and row of pixels, each column and each channel has a random key, and whether an element
is dropped is a hash of the keys it lies under. The backward pass makes the forward's mask again
from them, and so does any other backend, bit by bit, in either memory format. What is done for an
element is short, so that it can be done while the element is read. The keys come from PyTorch's
generator: ``torch.manual_seed``, activation checkpointing and CUDA graphs treat them as any other
random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernelnorm.ops.regions import in_halves, once

HASH_MULTIPLIER = 0x7FEB352D
"""Odd, with well-mixed bits."""

_RESOLUTION = 1 << 16


class Keys(NamedTuple):
    """All that a mask is made of.

    Shape:
        - pixels, channels: :math:`(N, 1, *)` and :math:`(C, 1, ...)`, odd, int32
    """

    pixels: Tensor
    channels: Tensor
    first_kept: int  # the smallest hash, a signed 32-bit integer, of an element that is kept


def rounded_p(p: float) -> float:
    """The dropout probability in steps of 1/65536: the one that a mask has exactly."""
    return min(round(p * _RESOLUTION), _RESOLUTION - 1) / _RESOLUTION


def kappa(p: float, n: int) -> float:
    r"""What is added to the variance of ``n`` elements in place of a mask.

    :math:`\mathbb{E}[\text{var}(m u)] = \text{var}(u) + \kappa \, \text{mean}(u^2)`, exactly.
    """
    p = rounded_p(p)
    return p / (1 - p) * (1 - 1 / max(n, 1))


def draw_keys(shape: Sequence[int], device: torch.device) -> Tensor:
    """Fresh keys for a tensor of shape :math:`(N, C, L_1, L_2, ...)`: int32.

    Shape:
        - Output: :math:`(C + N L_1 + L_2 + ...,)`
    """
    size = (count_keys(shape),)
    return torch.randint(-(1 << 31), 1 << 31, size, dtype=torch.int32, device=device)


def count_keys(shape: Sequence[int]) -> int:
    """How many keys a tensor of that shape has."""
    n, channels, first, *others = shape if len(shape) > 2 else (*shape, 1)
    return channels + n * first + sum(others)


def spread_keys(keys: Tensor, shape: Sequence[int], p: float) -> Keys:
    """What :func:`draw_keys` returned for this shape, as :func:`keep` takes it.

    Args:
        p: the dropout probability; it rounds to more than zero
    """
    n, channels, *spatial = shape
    first, *others = spatial or [1]
    of_channels, pixels, *more = keys.bitwise_or(1).split([channels, n * first, *others])
    ones = [1] * len(spatial)
    pixels = pixels.view(n, 1, *spatial[:1], *ones[1:])
    for i, (size, factor) in enumerate(zip(others, more, strict=True)):
        pixels = pixels * factor.view(size, *ones[i + 2 :])
    first_kept = round(rounded_p(p) * _RESOLUTION) * (1 << 16) - (1 << 31)
    of_channels = of_channels.view(channels, *ones)
    return Keys(in_halves(once(pixels)), in_halves(of_channels), first_kept)


def keep(keys: Keys, dtype: torch.dtype) -> Tensor:
    """One for the elements that are kept, zero with probability :func:`rounded_p`.

    The product with an odd random key is a universal hash: for two elements of a row or of a
    column it is as good as independent. What follows makes it so for the corners of a rectangle.

    Shape:
        - Output: :math:`(N, C, *)`, with the strides of ``channels_last``
    """
    element = keys.pixels.movedim(1, -1) * keys.channels.flatten()
    element = element.bitwise_xor_((element >> 15).bitwise_and_(0x1FFFF)).mul_(HASH_MULTIPLIER)
    # A comparison, in operations that take half of its time on a CPU.
    last_dropped = keys.first_kept - 1
    kept = element.clamp(last_dropped, keys.first_kept).sub_(last_dropped).to(dtype)
    return kept.movedim(-1, 1)
