"""How much rounding costs: low precision, large means, constant windows."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from kernelnorm import KNConv2d, reference
from kernelnorm.functional import kernel_norm, kn_conv
from kernelnorm.ops.backends import eager
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry
from tests.oracle import on_backend
from tests.strategies import mask_of


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("groups", [1, 4])
def test_low_precision_is_as_good_as_a_convolution_of_standardised_inputs(device, dtype, p, groups):
    """A mean of 10 beside a deviation of 1 leaves few digits to a difference of large numbers."""
    x = (torch.randn(4, 64, 12, 12, device=device) + 10).to(dtype)
    weight = torch.randn(32, 64 // groups, 3, 3, device=device) / 24
    weight = weight + 0.05  # filters whose sum is far from zero
    mask = mask_of(11, x.shape, p, device)
    with torch.autocast(device.type, dtype):
        y = kn_conv(x, weight, groups=groups, dropout_p=p)
    none, ones = [0, 0], [1, 1]
    exact = reference.kn_conv(x.double(), weight.double(), None, ones, none, ones, groups, mask)

    standard = (x.double() - 10).to(dtype)
    plain = F.conv2d(standard, weight.to(dtype), groups=groups)
    exact_plain = F.conv2d(standard.double(), weight.double(), groups=groups)
    assert relative_error(y, exact) <= 2 * relative_error(plain, exact_plain)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
def test_low_precision_gradients(device, dtype, most):
    """The gradient of the weight is a difference of sums that were rounded: it loses a digit."""
    x = (torch.randn(4, 64, 12, 12, device=device) + 10).to(dtype)
    weight = (torch.randn(32, 64, 3, 3, device=device) / 24).to(dtype)
    grad = torch.randn(4, 32, 10, 10, device=device).to(dtype)
    gradients = []
    for wide in (dtype, torch.float64):
        inputs = [x.to(wide).requires_grad_(), weight.to(wide).requires_grad_()]
        y = kn_conv(*inputs, dropout_p=0)
        gradients.append(torch.autograd.grad(y, inputs, grad.to(wide)))
    for low, exact in zip(*gradients, strict=True):
        assert relative_error(low, exact) < most


@pytest.mark.parametrize("offset", [0.0, 0.05], ids=["balanced filters", "offset filters"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_with_a_mean_of_1000(offset, groups, memory_format):
    x = (torch.randn(4, 64, 12, 12) + 1000).contiguous(memory_format=memory_format)
    weight, grad = torch.randn(32, 64 // groups, 3, 3) / 24 + offset, torch.randn(4, 32, 10, 10)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        y = kn_conv(*inputs, groups=groups, dropout_p=0)
        results.append([y, *torch.autograd.grad(y, inputs, grad.to(dtype))])
    for single, double in zip(*results, strict=True):
        assert relative_error(single, double) < 1e-3
    normalized = kernel_norm(x, 3, dropout_p=0)
    assert relative_error(normalized, kernel_norm(x.double(), 3, dropout_p=0)) < 1e-3


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_float32_with_a_mean_of_1000_and_dropout(kernel_size):
    """Some windows of a colour image lose none of their few elements: their variance is small."""
    x = torch.randn(4, 3, 24, 24) + 1000
    weight = torch.randn(8, 3, kernel_size, kernel_size)
    mask = mask_of(5, x.shape, 0.1)
    y = kn_conv(x, weight)
    none, ones = [0, 0], [1, 1]
    exact = reference.kn_conv(x.double(), weight.double(), None, ones, none, ones, 1, mask)
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)
    assert relative_error(y, exact) < 1e-2


@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("p", [0.001, 0.1])
def test_float32_in_evaluation_is_as_exact_as_its_convolution(mean, p):
    """The expected variance bounds the mean in units of the deviation, by about 1 / sqrt(p).

    Convolutions round differently on each processor; what the layer adds is small beside the
    filters.
    """
    x = torch.randn(4, 64, 12, 12) + mean
    weight = torch.randn(32, 64, 3, 3) / 24 + 0.1
    single, double = (x, weight), (x.double(), weight.double())
    y, exact = (kn_conv(*inputs, dropout_p=p, training=False) for inputs in (single, double))
    z, exact_z = (F.conv2d(*inputs) for inputs in (single, double))
    geometry = Geometry((3, 3), (1, 1), (0, 0), (1, 1))
    settings = Settings(geometry, 1, p, False, 1e-5, None)
    r = eager.window_statistics(double[0], None, settings, False).rstd
    of_convolution = ((z - exact_z) * r).abs().max()
    unit = torch.finfo(torch.float32).eps * weight.abs().sum((1, 2, 3)).max() / p**0.5
    assert (y - exact).abs().max() < of_convolution + 3 * unit


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 255.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_constant_windows_are_finite_and_zero_without_dropout(value, dtype, training):
    x = torch.full((2, 3, 6, 6), value, dtype=dtype, requires_grad=True)
    weight = (torch.randn(4, 3, 3, 3) + 1).to(dtype).requires_grad_()
    for p in (0.0, 0.1):
        y = kn_conv(x, weight, dropout_p=p, training=training)
        z = kernel_norm(x, 2, dropout_p=p, training=training)
        for tensor in (y, z, *torch.autograd.grad(y.sum() + z.sum(), [x, weight])):
            assert tensor.isfinite().all()
        if p == 0:
            # Of the size of rounding, times the inverse of the root of eps. In bfloat16 the
            # convolution rounds what rounding has left of the sum of centred filters.
            rounding = torch.finfo(dtype).eps ** (2 if dtype == torch.bfloat16 else 1)
            unit = 316 * max(abs(value), 1) * 2 * 27 * rounding
            assert y.abs().max() <= unit
            assert z.abs().max() <= unit


@pytest.mark.parametrize(
    ("dtype", "value", "stated"),
    [
        (torch.float32, 255.0, 0.02), (torch.bfloat16, 255.0, 2.3),
        (torch.float32, 1.0, 0.00008), (torch.bfloat16, 1.0, 0.005),
    ],
)  # fmt: skip
def test_errors_on_images_of_one_shade_are_of_the_size_that_the_page_says(dtype, value, stated):
    """In a first layer for colour images. Other filters and processors round differently."""
    torch.manual_seed(0)
    layer = KNConv2d(3, 16, 3, dropout_p=0, dtype=dtype)
    with torch.no_grad():
        y = layer(torch.full((1, 3, 8, 8), value, dtype=dtype)).double()
    assert (y - layer.bias.double().view(-1, 1, 1)).abs().max() < stated


@pytest.mark.parametrize(("channels", "kernel_size"), [(3, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("with_kernels", [False, True], ids=["eager", "kernels"])
def test_float32_in_masked_windows_of_few_elements(
    device, channels, kernel_size, p, mean, with_kernels
):
    """Of some windows a mask leaves elements of hardly any variance, beside large ones it drops.

    The error is of the size of what a change of the input by half a unit in the last place does.
    """
    x = torch.randn(8, channels, 12, 12, device=device) + mean
    weight = torch.randn(16, channels, kernel_size, kernel_size, device=device)
    mask, none, ones = mask_of(3, x.shape, p, device), [0, 0], [1, 1]

    def with_gradients(layer, x):
        inputs = [x.detach().requires_grad_(), weight.to(x.dtype).requires_grad_()]
        y = layer(*inputs)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        return [y, *torch.autograd.grad(y, inputs, grad)]

    def exact(x, weight):
        return reference.kn_conv(x, weight, None, ones, none, ones, 1, mask)

    ulp = torch.nextafter(x, x + 1).double() - x.double()
    nudged = [  # one alone can by chance change little
        with_gradients(exact, x.double() + ulp * (torch.rand_like(ulp) - 0.5)) for _ in range(4)
    ]
    expected = with_gradients(exact, x.double())
    torch.manual_seed(3)
    with nullcontext() if with_kernels else on_backend(eager):
        results = with_gradients(lambda *inputs: kn_conv(*inputs, dropout_p=p), x)
    for single, double, *near in zip(results, expected, *nudged, strict=True):
        change = max(relative_error(nearby, double) for nearby in near)
        assert relative_error(single, double) < 1e-4 + 20 * change
