"""The masks as random numbers: rate, independence, no repeats, and repetition on request."""

from __future__ import annotations

import math

import pytest
import torch

from kernelnorm.ops.mask import draw_seed, keep_mask, rounded_p

CPU = torch.device("cpu")


def drops(shape: tuple[int, ...], p: float, seed: int) -> torch.Tensor:
    return keep_mask(torch.tensor(seed), shape, p, torch.float32) == 0


def z_score(count: float, n: int, p: float) -> float:
    return (count - n * p) / math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("p", [1e-4, 0.001, 0.05, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_rate(p: float):
    for seed in (0, 1, -1, 2**62, -(2**63), 123456789):
        d = drops((8, 64, 64, 64), p, seed)
        assert abs(z_score(d.sum().item(), d.numel(), rounded_p(p))) < 5


def test_rate_of_each_channel_row_column_sample_and_lane():
    p, shape = 0.1, (16, 64, 40, 48)
    d = drops(shape, p, 7).double()
    for axis, size in enumerate(shape):
        counts = d.sum([i for i in range(4) if i != axis])
        z = (counts - d.numel() / size * p) / math.sqrt(d.numel() / size * p * (1 - p))
        assert z.abs().max() < 5
    lanes = d.movedim(1, -1).reshape(-1, 4).sum(0)
    assert all(abs(z_score(n.item(), d.numel() // 4, p)) < 5 for n in lanes)


def test_chi_square_over_runs_of_eight_neighbours():
    """All 256 patterns of eight elements in a row appear as often as they should."""
    p = 0.5
    d = drops((64, 64, 64, 64), p, 99).movedim(1, -1).reshape(-1, 8).long()
    patterns = (d * 2 ** torch.arange(8)).sum(1)
    observed = torch.bincount(patterns, minlength=256).double()
    expected = len(patterns) / 256
    chi2 = ((observed - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 65, 256, 1024, 4096, 65536])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(lag: int, p: float):
    d = drops((16, 64, 32, 32), p, 1234 + lag).movedim(1, -1).flatten()
    both = (d[lag:] & d[:-lag]).sum().item()
    assert abs(z_score(both, d.numel() - lag, p * p)) < 5


@pytest.mark.parametrize(
    "step", [1, 2, -1, 1000, 1 << 16, 1 << 32, 1 << 48, 1 << 63, -7046029254386353131]
)
def test_masks_of_related_seeds_are_independent(step: int):
    """A seed one apart, or apart by what moves the counter by one, gives another mask."""
    p, shape = 0.1, (4, 64, 64, 64)
    a, b = drops(shape, p, 42 - 2**63), drops(shape, p, (42 + step) % 2**64 - 2**63)
    for shift in (0, 4, 8, 4000):
        both = a.movedim(1, -1).flatten()[shift:] & b.movedim(1, -1).flatten()[: a.numel() - shift]
        assert abs(z_score(both.sum().item(), both.numel(), p * p)) < 5


def test_layers_and_steps_differ_and_manual_seed_repeats():
    torch.manual_seed(0)
    seeds = [draw_seed(CPU).item() for _ in range(1000)]
    assert len(set(seeds)) == 1000
    torch.manual_seed(0)
    assert [draw_seed(CPU).item() for _ in range(1000)] == seeds


def test_rounding_of_p():
    assert rounded_p(0) == 0
    assert rounded_p(0.1) == pytest.approx(0.1, abs=1 / 65536)
    assert rounded_p(1 - 1e-9) < 1


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 5, 7), (1, 1, 1), (2, 3, 5, 7, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype):
    mask = keep_mask(torch.tensor(3), shape, 0.5, dtype)
    assert mask.shape == shape
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) <= {0, 1}
