"""Convolutions for which oneDNN's results are wrong, or that end the process."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelnorm.ops.backends import eager
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry
from tests.oracle import EPS, assert_same
from tests.strategies import Case

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# The package has a function of the same name.
cpu_convolution = importlib.import_module("kernelnorm.ops.backends.cpu.convolution")

CASES = {
    "windows in the padding": ((10, 1), 7, 1, 1, Geometry((2, 1), (5, 2), (0, 1), (4, 2))),
    "weights in the padding": ((1, 1), 17, 8, 1, Geometry((5, 5), (2, 2), (2, 2), (1, 1))),
    "along one dimension": ((1,), 17, 8, 1, Geometry((2,), (3,), (1,), (1,))),
    "shorter than the window": ((1, 3, 3), 16, 16, 2, Geometry((2, 3, 3), *[(1,) * 3] * 3)),
    "dilated": ((5, 72), 14, 2, 2, Geometry((3, 3), (1, 1), (1, 1), (2, 4))),
    "dilated, depthwise": ((7, 73), 16, 16, 16, Geometry((3, 1), (1, 1), (2, 0), (2, 1))),
    "dilated lines": ((7, 50), 16, 16, 16, Geometry((1, 2), (1, 1), (0, 0), (4, 1))),
    "one window wide": ((6, 4), 3, 21, 3, Geometry((2, 3), (1, 2), (1, 0), (1, 1))),
}  # fmt: skip


def test_slice_of_one_channel_in_float32():
    geometry = Geometry((3, 3), (1, 5), (2, 2), (1, 1))
    settings = Settings(geometry, 1, 0.0, False, EPS, slope=None)
    case = Case(geometry, (1, 3), 3, 1, 1, 1, "slice of channels_last", seed=0)
    x, (filters, _) = case.input(torch.float32), case.filters(torch.float32)
    expected = eager.convolution(x.double().contiguous(), filters.double(), settings)
    assert_same(cpu_convolution.convolution(x, filters, settings), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_windows_take_pytorchs_own_convolutions(dtype: torch.dtype):
    """With several threads oneDNN writes outside of its memory there."""
    x, filters = torch.randn(2, 3, 3, 6, 3, dtype=dtype), torch.randn(7, 3, 2, 2, 1, dtype=dtype)
    geometry = Geometry((2, 2, 1), (5, 1, 3), (1, 1, 0), (4, 1, 2))
    settings = Settings(geometry, 1, 0.0, False, EPS, slope=None)
    with mock.patch.object(eager, "convolution", wraps=eager.convolution) as called:
        y = cpu_convolution.convolution(x, filters, settings)
    assert called.call_args.args[0].dtype == torch.float64
    assert y.dtype == dtype
    assert not y.any()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_is_a_convolution(name: str, layout: str):
    sizes, in_channels, out_channels, groups, geometry = CASES[name]
    settings = Settings(geometry, groups, 0.0, False, EPS, slope=None)
    for seed in range(20):
        case = Case(geometry, sizes, 3, groups, in_channels, out_channels, layout, seed)
        x, (filters, _) = case.input(torch.bfloat16), case.filters(torch.bfloat16)
        z = cpu_convolution.convolution(x, filters, settings)
        expected = eager.convolution(x.double(), filters.double(), settings)
        assert_same(z, expected, torch.bfloat16)
        grad = case.randn(*z.shape, dtype=torch.bfloat16)
        mu, sums = torch.zeros(3, 1, *z.shape[2:]), torch.zeros(out_channels)
        needs = True, True
        grad_x, grad_filters = cpu_convolution.convolution_backward(
            grad, x, filters, mu, sums, settings, needs
        )
        exact = eager.convolution_backward(
            grad.double(), x.double(), filters.double(), mu, sums.double(), settings, needs
        )
        assert_same(grad_x, exact[0], torch.bfloat16)
        assert_same(grad_filters, exact[1], torch.float32, unit=2**-7)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, Geometry]:
    """The size of an input of one dimension, and a window that fits into its padded form."""
    size, k, stride = (draw(st.integers(1, 5)) for _ in range(3))
    padding, dilation = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    geometry = Geometry((k,), (stride,), (padding,), (dilation,))
    return max(size, geometry.reach(0) - 2 * padding), geometry


@given(geometries())
def test_what_sees_only_padding(drawn: tuple[int, Geometry]):
    size, geometry = drawn
    ((k,), (stride,), (padding,), (dilation,)) = geometry
    seen = [
        [0 <= window * stride + weight * dilation - padding < size for weight in range(k)]
        for window in range(geometry.positions(0, size))
    ]
    assert cpu_convolution.has_empty_window((size,), geometry) == (not all(map(any, seen)))
    all_see_pixels = all(map(any, seen)) and all(map(any, zip(*seen, strict=True)))
    too_large = geometry.reach(0) > size
    assert cpu_convolution.sees_only_padding((size,), geometry) == (too_large or not all_see_pixels)
