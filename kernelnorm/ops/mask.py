"""Dropout masks from random keys: the same keys give the same mask, so no mask is ever stored.

Each row of each sample, each column and each channel has a random 32-bit key. An element is dropped
if a hash of its keys falls below a threshold. The backward pass rebuilds the mask of the
forward pass from the keys, and so does every backend, bit for bit and in any memory format. The
keys come from PyTorch's generator, so ``torch.manual_seed``, activation checkpointing and CUDA
graphs treat them as any other random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HASH_MULTIPLIER = 0x7FEB352D
"""The multiplier of the hash: an odd number with well-mixed bits."""

_RESOLUTION = 1 << 16


class Keys(NamedTuple):
    """Expanded keys, one per pixel and one per channel, and the threshold of the mask.

    Shape:
        - pixels, channels: :math:`(N, 1, *)` and :math:`(C, 1, ...)`, odd, int32
    """

    pixels: Tensor
    channels: Tensor
    threshold: int


def rounded_p(p: float) -> float:
    """The dropout probability, rounded to steps of 1/65536 and below 1.

    A mask drops elements with this probability to within 1e-8.
    """
    return min(round(p * _RESOLUTION), _RESOLUTION - 1) / _RESOLUTION


def keep_threshold(p: float) -> int:
    """The smallest hash, a signed 32-bit integer, of an element that is kept."""
    return round(rounded_p(p) * _RESOLUTION) * (1 << 16) - (1 << 31)


def dropout_variance(p: float, n: int) -> float:
    r"""The factor :math:`\kappa` of the variance that dropout adds to a window of ``n`` elements.

    :math:`\mathbb{E}[\text{var}(m u)] = \text{var}(u) + \kappa \, \text{mean}(u^2)` with
    :math:`\kappa = \frac{p}{1-p} (1 - \frac1n)`, exactly.
    """
    p = rounded_p(p)
    return p / (1 - p) * (1 - 1 / max(n, 1))


def draw_keys(shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw keys for a tensor of shape :math:`(N, C, L_1, L_2, ...)`.

    Shape:
        - Output: :math:`(C + N L_1 + L_2 + ...,)`, int32
    """
    size = (count_keys(shape),)
    return torch.randint(-(1 << 31), 1 << 31, size, dtype=torch.int32, device=device)


def count_keys(shape: Sequence[int]) -> int:
    """The number of keys that :func:`draw_keys` draws."""
    n, channels, first, *others = shape if len(shape) > 2 else (*shape, 1)
    return channels + n * first + sum(others)


def expand_keys(keys: Tensor, shape: Sequence[int], p: float) -> Keys:
    """Expand drawn keys to one per pixel and one per channel.

    A pixel's key is the product of the keys of its row, column, ..., modulo :math:`2^{32}`.
    """
    n, channels, *spatial = shape
    first, *others = spatial or [1]
    of_channels, pixels, *more = keys.bitwise_or(1).split([channels, n * first, *others])
    ones = [1] * len(spatial)
    pixels = pixels.view(n, 1, *spatial[:1], *ones[1:])
    for i, (size, factor) in enumerate(zip(others, more, strict=True)):
        pixels = pixels * factor.view(size, *ones[i + 2 :])
    return Keys(pixels, of_channels.view(channels, *ones), keep_threshold(p))


def keep(keys: Keys, dtype: torch.dtype) -> Tensor:
    """The mask: one for kept elements, zero with probability :func:`rounded_p`.

    The product with an odd random key is a universal hash: two elements of a row or column are
    practically independent. After the shift and the second product, so are the four corners of a
    rectangle.

    Shape:
        - Output: :math:`(N, C, *)`, with the strides of ``channels_last``
    """
    element = keys.pixels.movedim(1, -1) * keys.channels.flatten()
    element = element.bitwise_xor((element >> 15).bitwise_and(0x1FFFF)) * HASH_MULTIPLIER
    return (element >= keys.threshold).to(dtype).movedim(-1, 1)
