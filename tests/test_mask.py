"""The masks as random numbers: rate, independence, no repeats, and repetition on request."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from kernelnorm.ops.mask import (
    count_keys,
    draw_keys,
    dropout_variance,
    expand_keys,
    keep,
    keep_threshold,
    rounded_p,
)

CPU = torch.device("cpu")


def drops(shape: tuple[int, ...], p: float) -> torch.Tensor:
    return keep(expand_keys(draw_keys(shape, CPU), shape, p), torch.float32) == 0


def z_score(count: float, n: int, p: float) -> float:
    return (count - n * p) / math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("p", [1e-4, 0.001, 0.05, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_rate(p: float):
    for _ in range(6):
        d = drops((8, 64, 64, 64), p)
        assert abs(z_score(d.sum().item(), d.numel(), rounded_p(p))) < 5


def test_rate_of_each_channel_row_column_and_sample():
    p, shape = 0.1, (16, 64, 40, 48)
    d = drops(shape, p).double()
    for axis, size in enumerate(shape):
        counts = d.sum([i for i in range(4) if i != axis])
        z = (counts - d.numel() / size * p) / math.sqrt(d.numel() / size * p * (1 - p))
        assert z.abs().max() < 5.5


def test_chi_square_over_runs_of_eight_neighbours():
    """All 256 patterns of eight elements in a row appear as often as they should."""
    d = drops((64, 64, 64, 64), 0.5).movedim(1, -1).reshape(-1, 8).long()
    patterns = (d * 2 ** torch.arange(8)).sum(1)
    observed = torch.bincount(patterns, minlength=256).double()
    expected = len(patterns) / 256
    chi2 = ((observed - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 65, 256, 1024, 4096, 65536])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(lag: int, p: float):
    d = drops((16, 64, 32, 32), p).movedim(1, -1).flatten()
    both = (d[lag:] & d[:-lag]).sum().item()
    assert abs(z_score(both, d.numel() - lag, p * p)) < 5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_any_two_pixels_and_any_two_channels_are_independent(p: float):
    """The joint drops of all pairs have the mean and the variance of independent ones."""
    pixels, channels = 2048, 256
    statistics = []
    for _ in range(10):
        d = drops((pixels, channels), p).double()
        e = (d - p) / math.sqrt(p * (1 - p))
        for rows in (e, e.T):
            correlation = (rows @ rows.T / math.sqrt(rows.shape[1])).fill_diagonal_(0)
            pairs = len(rows) * (len(rows) - 1)
            statistics.append((correlation.sum() / pairs, correlation.square().sum() / pairs))
    for of_pixels in (0, 1):
        means, squares = zip(*statistics[of_pixels::2], strict=True)
        assert abs(sum(means) / 10) < 0.05
        assert abs(sum(squares) / 10 - 1) < 0.03


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (2, 3), (0, 3), (1, 3)])
def test_corners_of_rectangles_are_independent(p: float, axes: tuple[int, int]):
    """Four elements that share their keys in pairs: the product of their deviations is zero."""
    d = drops((32, 64, 32, 32), p).double()
    e = (d - p) / math.sqrt(p * (1 - p))
    for axis in axes:
        e = e.movedim(axis, 0)
        e = (e[::2] * e[1::2]).movedim(0, axis)
    assert abs(e.mean() * math.sqrt(e.numel())) < 5


def test_corners_of_boxes_are_independent():
    d = drops((32, 64, 32, 32), 0.5).double()
    e = 2 * d - 1
    for axis in (1, 2, 3):
        e = e.movedim(axis, 0)
        e = (e[::2] * e[1::2]).movedim(0, axis)
    assert abs(e.mean() * math.sqrt(e.numel())) < 5


def test_layers_and_steps_differ_and_manual_seed_repeats():
    torch.manual_seed(0)
    masks = [drops((2, 8, 16, 16), 0.1) for _ in range(100)]
    overlaps = [(a & b).sum().item() for a, b in pairwise(masks)]
    assert abs(z_score(sum(overlaps), 99 * masks[0].numel(), 0.01)) < 5
    torch.manual_seed(0)
    assert all(torch.equal(drops((2, 8, 16, 16), 0.1), mask) for mask in masks)


def test_no_pixel_repeats_another():
    """But by chance: two of 8192 pixels have the same of 2**31 keys in 1.6 % of all draws."""
    pixels = drops((8, 64, 32, 32), 0.5).movedim(1, -1).flatten(0, -2)
    assert len(pixels.unique(dim=0)) >= 8 * 1024 - 2


def test_rounding_of_p():
    assert rounded_p(0) == 0
    assert rounded_p(0.1) == pytest.approx(0.1, abs=1 / 65536)
    assert rounded_p(1 - 1e-9) < 1


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 5, 7), (1, 1, 1), (2, 3, 5, 7, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype):
    mask = keep(expand_keys(draw_keys(shape, CPU), shape, 0.5), dtype)
    assert mask.shape == shape
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (0, 3, 4)])
def test_there_are_as_many_keys_as_are_drawn(shape: tuple[int, ...]):
    assert count_keys(shape) == draw_keys(shape, CPU).numel()
    keys = expand_keys(draw_keys(shape, CPU), shape, 0.1)
    assert keys.pixels.shape == (shape[0], 1, *shape[2:])
    assert keys.channels.shape == (shape[1], *[1] * (len(shape) - 2))


def test_the_threshold_is_the_probability_in_signed_integers():
    assert keep_threshold(0) == -(1 << 31)
    assert keep_threshold(0.5) == 0
    for p in (1e-6, 0.1, 0.999999):
        assert (keep_threshold(p) + (1 << 31)) / (1 << 32) == rounded_p(p)
        assert -(1 << 31) <= keep_threshold(p) < 1 << 31


@pytest.mark.parametrize(("p", "n", "expected"), [(0, 9, 0), (0.5, 1, 0), (0.5, 4, 0.75)])
def test_the_variance_of_dropout(p: float, n: int, expected: float):
    assert dropout_variance(p, n) == expected
