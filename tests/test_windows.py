"""The box filter against a convolution with ones, and its transpose against the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelnorm.ops.windows import box_sum, box_sum_transpose
from tests.strategies import Case, cases


@settings(max_examples=100, deadline=None)
@given(cases())
def test_box_sum_is_a_convolution_with_ones(case: Case):
    kernel_size, stride, padding, dilation = case.geometry
    maps = case.randn(case.batch, 2, *case.sizes)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[case.d]
    ones = maps.new_ones(2, 1, *kernel_size)
    expected = conv(maps, ones, None, stride, padding, dilation, groups=2)
    torch.testing.assert_close(box_sum(maps, case.geometry), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_transpose_has_the_same_inner_products(case: Case):
    maps = case.randn(case.batch, 2, *case.sizes)
    sums = box_sum(maps, case.geometry)
    other = case.randn(*sums.shape)
    back = box_sum_transpose(other, case.geometry, case.sizes)
    assert back.shape == maps.shape
    torch.testing.assert_close((sums * other).sum(), (maps * back).sum(), rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(cases(), st.sampled_from([1.0, 0.5]), st.sampled_from([0.0, 3.0]))
def test_box_sum_with_a_factor_and_a_bias(case: Case, factor: float, bias: float):
    maps = case.randn(case.batch, 2, *case.sizes)
    sums = box_sum(maps, case.geometry, factor, bias)
    expected = factor * box_sum(maps, case.geometry) + bias
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
