"""The layers in other dtypes, devices and memory formats than the default ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

import kernelnorm as kn
from kernelnorm.ops.backends import eager
from tests.networks import assert_all_close, conv_and_norm, images, run
from tests.oracle import on_backend


@pytest.fixture
def x() -> Tensor:
    return images()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [None, torch.float32, torch.float64])
def test_autocast(x: Tensor, dtype: torch.dtype, input_dtype: torch.dtype | None):
    """Low-precision outputs near the float32 ones, float32 gradients, float64 left alone."""
    input_dtype = input_dtype or dtype
    module = conv_and_norm()
    if input_dtype == torch.float64:
        module.double()
    parameters = [*module.parameters()]

    def with_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            y = module(x)
        assert y.dtype == (torch.float64 if input_dtype == torch.float64 else dtype)
        return y

    exact = run(module.double(), x.double(), parameters)
    module.to(torch.float64 if input_dtype == torch.float64 else torch.float32)
    low = run(with_autocast, x.to(input_dtype), [*module.parameters()])
    assert [t.dtype for t in low[2:]] == [p.dtype for p in module.parameters()]
    for a, b in zip(low, exact, strict=True):
        assert (a.double() - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float32, 1e-5), (torch.float64, 1e-12)],
)
def test_a_module_in_another_dtype(x: Tensor, dtype: torch.dtype, tolerance: float):
    """Beside PyTorch operations in float64, of the same rounded weights and input."""
    module, x = conv_and_norm().to(dtype), x.to(dtype)
    exact = copy.deepcopy(module).double()
    results = run(module, x, [*module.parameters()])
    with on_backend(eager):
        expected = run(exact, x.double(), [*exact.parameters()])
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


def test_meta_device():
    with torch.device("meta"):
        module = conv_and_norm()
        y = module(torch.randn(3, 4, 9, 8, requires_grad=True))
    assert y.is_meta
    y.sum().backward()
    expected = conv_and_norm()(torch.randn(3, 4, 9, 8))
    assert y.shape == expected.shape
    kn.KNConv2d(4, 8, 3, device="meta").to_empty(device="cpu").reset_parameters()


def test_channels_last_module(x: Tensor):
    module, x = conv_and_norm().double(), x.double()
    parameters = [*module.parameters()]
    expected = run(module, x, parameters)
    module.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_all_close(run(module, x, parameters), expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
def test_other_default_dtypes_and_devices(default: torch.dtype, device: str | None, bias: bool):
    """Also a default device that is not that of the tensors."""
    layers = [
        kn.KNConv2d(4, 8, 3, padding=1, stride=2, activation="relu", bias=bias),
        kn.KernelNorm2d(2, stride=1), kn.KNConv2d(8, 4, 1, bias=bias),
    ]  # fmt: skip
    network, x = nn.Sequential(*layers).float(), images().float()
    expected = run(network, x, [*network.parameters()])
    try:
        torch.set_default_dtype(default)
        torch.set_default_device(device)
        results = run(network, x, [*network.parameters()])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_all_close(results, expected, tolerance=0)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_parameter_on_another_device_is_an_error_that_names_both(x: Tensor, part: str):
    layer = kn.KNConv2d(4, 8, 3)
    setattr(layer, part, nn.Parameter(getattr(layer, part).to("meta")))
    with pytest.raises(ValueError, match=rf"input on cpu, .*{part} on meta.*\.to\(device\)"):
        layer(x)
    with pytest.raises(ValueError, match=r"input on meta, weight on cpu"):
        kn.KNConv2d(4, 8, 3)(x.to("meta"))


def test_volumes_of_ct_with_anisotropic_windows():
    """As nnU-Net has them: Hounsfield units, a LeakyReLU in place, two samples."""
    torch.manual_seed(0)
    network = nn.Sequential(
        kn.KNConv3d(1, 8, (1, 3, 3), padding=(0, 1, 1)), nn.LeakyReLU(0.01, inplace=True),
        kn.KNConv3d(8, 16, 3, stride=(1, 2, 2), padding=1), nn.LeakyReLU(0.01, inplace=True),
        kn.KNConv3d(16, 16, 3, stride=2, padding=1), nn.LeakyReLU(0.01, inplace=True),
        nn.ConvTranspose3d(16, 8, (2, 4, 4), (2, 4, 4)), kn.KNConv3d(8, 3, 1),
    )  # fmt: skip
    x = torch.randn(2, 1, 6, 24, 20) * 400 - 700
    for training in (True, False):
        results = []
        for dtype in (torch.float32, torch.float64):
            module = copy.deepcopy(network).to(dtype).train(training)
            results.append(run(module, x.to(dtype), [*module.parameters()], seed=3))
        for single, double in zip(*results, strict=True):
            assert (single.double() - double).norm() <= 1e-2 * double.norm() + 1e-6
        network.train(training)
        exact = results[1][0]
        for dtype in (torch.bfloat16, torch.float16):
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype):
                low = network(x)
            assert (low.double() - exact).norm() < 0.1 * exact.norm()


def test_views_that_negate():
    """The imaginary part of a conjugate has its sign in a flag, not in memory."""
    layer = kn.KNConv2d(3, 4, 3, activation="relu").eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(layer(x), layer(x.resolve_neg()))
    y = layer(torch.randn(2, 3, 6, 6).requires_grad_())
    inputs = [*layer.parameters()]
    grad = torch.randn(y.shape, dtype=torch.complex64).conj().imag
    results = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    assert_all_close([*results], [*torch.autograd.grad(y, inputs, grad.resolve_neg())])
