"""The oracle against arithmetic done by hand, and against the paper's own second description."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings

from kernelnorm import reference
from tests.strategies import Case, cases


def test_one_window_by_hand():
    x = torch.tensor([[[1.0, 2.0, 6.0]]], dtype=torch.float64)
    mask = torch.tensor([2.0, 0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 3)
    # Dropped-out unit 2, 0, 12: mean 14/3, variance 148/3 - (14/3)^2 = 248/9.
    y = reference.kernel_norm(x, [3], [3], [0], mask, eps=0)
    expected = (x - 14 / 3) / (248 / 9) ** 0.5
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None)
@given(cases(dilated=False))
def test_kn_conv_is_a_convolution_of_kernel_norms_output(case: Case):
    """Figure 2: kernel and stride of the convolution are the kernel size of KernelNorm."""
    kernel_size, stride, padding, dilation = case.geometry
    x, (weight, bias) = case.input(), case.filters()
    normalized = reference.kernel_norm(x, kernel_size, stride, padding)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[case.d]
    expected = conv(normalized, weight, bias, stride=kernel_size, groups=case.groups)
    y = reference.kn_conv(x, weight, bias, stride, padding, dilation, case.groups)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
