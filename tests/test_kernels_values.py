"""Values that are rounded, large or not finite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernelnorm.functional import kn_conv
from kernelnorm.ops import passes
from kernelnorm.ops.backends import Statistics, compute_dtype
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry
from tests.oracle import DTYPES, EPS, Random
from tests.strategies import laid_out

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float32_with_a_mean_of_1000(backend, groups: int, layout: str):
    x = laid_out(torch.randn(2, 32, 8, 8, device=backend.device) + 1000, layout)
    weight = torch.randn(16, 32 // groups, 3, 3, device=backend.device) / 17 + 0.05
    grad = torch.randn(2, 16, 6, 6, device=backend.device)
    results = []
    with backend.running():
        for dtype in (torch.float32, torch.float64):
            inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
            y = kn_conv(*inputs, groups=groups, dropout_p=0)
            results.append([y, *torch.autograd.grad(y, inputs, grad.to(dtype))])
    for single, exact in zip(*results, strict=True):
        assert (single.double() - exact).norm() < 1e-3 * exact.norm()


def test_runs_repeat_bit_by_bit(backend):
    random = Random(backend, 3)
    grad, kept = random.randn(2, 2, 32, 9, 9, dtype=torch.float32)
    rstd, mu = random.randn(2, 2, 1, 9, 9, dtype=torch.float32).abs()
    sums = kept[0, :, 0, 0]
    arguments = grad, kept, Statistics(mu, rstd), sums, None, 0.0, (1.0, 1.0)
    with backend.running():
        first, second = (backend.epilogue_backward(*arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_bfloat16_rounds_to_nearest_and_ties_to_even(backend):
    """As PyTorch does. The interpreter of Triton cuts off instead."""
    if backend.slow:
        pytest.skip("the interpreter cuts off")
    bits = torch.randint(-(1 << 31), 1 << 31, (4000,), dtype=torch.int32)
    ties = (torch.arange(-2000, 2000, dtype=torch.int32) << 16) + (1 << 15)
    special = torch.tensor([0.0, -0.0, torch.nan, 3.4e38, -3.4e38, 1e-45])
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    values = values.to(backend.device)
    for shape in ((1, -1, 1), (1, 1, -1)):  # along the channels, and along the pixels
        z = torch.zeros(values.view(shape).shape, dtype=torch.bfloat16, device=backend.device)
        one = torch.ones(1, 1, z.shape[2], device=backend.device)
        ones = torch.ones(z.shape[1], device=backend.device)
        terms = [(one, -values) if shape[1] == -1 else (-values.view(one.shape), ones)]
        with backend.running():
            y, _ = backend.epilogue(z, terms, one, None, None)
        expected = values.to(torch.bfloat16)
        assert torch.equal(y.flatten().nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("channels", [2, 9])  # loops along the pixels, and along the channels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_not_a_number_stays_one(backend, channels: int, layout: str, with_bias: bool):
    """As it does in PyTorch's ReLU and its gradient."""
    for dtype in DTYPES[backend.name]:
        values = torch.tensor([torch.nan, -1.0, 0.0, 1.0, torch.inf, -torch.inf], dtype=dtype)
        z = values.expand(2, channels, 3, 6).contiguous().to(backend.device)
        z = laid_out(z, layout)
        one = torch.ones(2, 1, 3, 6, dtype=compute_dtype(z), device=backend.device)
        zero = torch.zeros(channels, dtype=one.dtype, device=backend.device)
        bias = zero.to(dtype) if with_bias else None
        with backend.running():
            y, _ = backend.epilogue(z.clone(), [(0 * one, zero)], one, bias, 0.0)
        assert torch.equal(y.nan_to_num(7), z.relu().nan_to_num(7))
        kept = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(kept.relu(), kept, torch.ones_like(z))
        statistics = Statistics(0 * one, one)
        with backend.running():
            grad_z, *_ = backend.epilogue_backward(
                torch.ones_like(z), z, statistics, zero, bias, 0.0, (1.0, 1.0)
            )
        assert torch.equal(grad_z, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("channels", [2, 9])
def test_a_pixel_that_is_not_finite_spoils_its_windows_only(backend, value: float, channels: int):
    geometry = Geometry((3, 2), (2, 1), (1, 0), (1, 1))
    options = Settings(geometry, 1, 0.0, False, EPS, slope=0.0)
    weight = torch.randn(4, channels, 3, 2, device=backend.device)
    for layout in ("contiguous", "channels_last"):
        x = torch.randn(2, channels, 9, 8, device=backend.device)
        x[1, 1, 4, 3] = value
        x = laid_out(x, layout)
        with backend.running():
            statistics = backend.window_statistics(x, None, options, False)
            y = passes.forward(x, weight, None, None, options, backend).y
        expected = F.unfold(x[:, 1:2].isfinite().float(), (3, 2), stride=(2, 1), padding=(1, 0))
        padded = F.unfold(torch.ones_like(x[:, 1:2]), (3, 2), stride=(2, 1), padding=(1, 0))
        finite = (expected == padded).all(1).view(statistics.mu.shape)
        assert torch.equal(statistics.mu.isfinite(), finite)
        assert torch.equal(statistics.rstd.isfinite() & (statistics.rstd > 0), finite)
        assert y.isfinite()[:, :1][finite].all()


def test_flag_of_a_negative_bias_of_one_element_is_seen(backend):
    """One element is contiguous whatever its strides, so nothing would have copied it."""
    device = backend.device
    x, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(1, 3, 3, 3, device=device)
    bias = torch.view_as_complex(torch.tensor([[0.5, 1.5]], device=device)).conj().imag
    assert bias.is_neg()
    assert bias.is_contiguous()
    with backend.running():
        y, expected = (kn_conv(x, weight, b, dropout_p=0) for b in (bias, bias.resolve_neg()))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(y, kn_conv(x, weight, dropout_p=0) - 1.5)
