"""The masks of the kernels, bit by bit."""

from __future__ import annotations

import pytest
import torch

from kernelnorm.ops.mask import (
    HASH_MULTIPLIER,
    draw_keys,
    expand_keys,
    keep,
    keep_threshold,
)
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry
from tests.oracle import EPS
from tests.strategies import laid_out

pytestmark = pytest.mark.usefixtures("poisoned_memory")

POINT = {d: Geometry((1,) * d, (1,) * d, (0,) * d, (1,) * d) for d in (1, 2, 3)}
MASKED_SHAPES = [(3, 4, 70), (2, 20, 5, 7), (1, 40, 9), (2, 9, 3, 2, 5)]
PROBABILITIES = [1 / 65536, 0.1, 65535 / 65536]


def masked(d: int, p: float) -> Settings:
    return Settings(POINT[d], 1, p, True, EPS, slope=None)


@pytest.mark.parametrize("shape", MASKED_SHAPES)
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_mask_of_the_backward_bit_by_bit(backend, shape, p, layout):
    keys = draw_keys(shape, backend.device)
    x = laid_out(torch.zeros(shape, device=backend.device), layout)
    pair = torch.zeros(shape[0], 2, *shape[2:], device=backend.device)
    pair[:, 0] = 1
    with backend.running():
        mask = backend.statistics_backward(
            torch.zeros_like(x), x, pair, keys, masked(len(shape) - 2, p)
        )
    assert torch.equal(mask, keep(expand_keys(keys, shape, p), mask.dtype))


@pytest.mark.parametrize("shape", MASKED_SHAPES)
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_mask_of_the_forward_bit_by_bit(backend, shape, p, layout):
    """Each channel has a power of two, so that a pixel's mean has all bits of its mask."""
    channels, ones = shape[1], [1] * (len(shape) - 2)
    keys, mask = draw_keys(shape, backend.device), None
    powers = 2.0 ** torch.arange(channels, dtype=torch.float64, device=backend.device)
    x = laid_out(powers.view(-1, *ones).expand(shape).clone(), layout)
    with backend.running():
        mu = backend.window_statistics(x, keys, masked(len(shape) - 2, p), False).mu
    mask = keep(expand_keys(keys, shape, p), torch.float64)
    bits = (mu * channels * (1 - round(p * 65536) / 65536)).round()
    assert torch.equal(bits, (mask * powers.view(-1, *ones)).sum(1, keepdim=True))


def test_the_smallest_hash_that_is_kept(backend):
    """Keys whose hashes lie around the threshold."""
    p = 0.3
    threshold, modulus = keep_threshold(p), 1 << 32

    def key_of(hash_: int) -> int:
        mixed = hash_ * pow(HASH_MULTIPLIER, -1, modulus) % modulus
        return mixed ^ mixed >> 15 ^ mixed >> 30

    offsets = [i for i in range(-40, 40) if key_of(threshold + i) % 2]  # keys are odd
    assert min(offsets) < 0 <= max(offsets)
    keys = torch.tensor([1, *(key_of(threshold + i) for i in offsets)]).to(torch.int32)
    keys, shape = keys.to(backend.device), (1, 1, len(offsets))
    kept = [[[float(i >= 0) for i in offsets]]]
    assert keep(expand_keys(keys, shape, p), torch.float64).tolist() == kept
    x = torch.ones(shape, dtype=torch.float64, device=backend.device)
    with backend.running():
        mu = backend.window_statistics(x, keys, masked(1, p), False).mu
    assert (mu > 0).double().tolist() == kept
