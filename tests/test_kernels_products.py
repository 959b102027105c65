"""Products of matrices in place of convolutions, for few windows."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

import kernelnorm as kn
from kernelnorm.ops.windows import Geometry
from tests.strategies import LAYOUTS, laid_out

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# The package has a function of the same name.
cpu_convolution = importlib.import_module("kernelnorm.ops.backends.cpu.convolution")

WINDOWS = [
    Geometry((3,), (1,), (1,), (1,)),
    Geometry((3, 3), (1, 1), (1, 1), (1, 1)),
    Geometry((1, 1), (2, 2), (0, 0), (1, 1)),
    Geometry((2, 3), (1, 3), (0, 2), (2, 1)),
    Geometry((2, 1, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2)),
]


@pytest.mark.parametrize("geometry", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_product_is_the_gradient_of_a_centred_convolution(geometry: Geometry, layout: str):
    d = len(geometry.kernel_size)
    x = laid_out(torch.randn(2, 5, *[7, 6, 8][:d], dtype=torch.float64), layout)
    weight = torch.randn(4, 5, *geometry.kernel_size, dtype=torch.float64, requires_grad=True)
    z = torch.convolution(
        x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, (0,) * d, 1
    )
    mu, grad_z = torch.randn(2, 1, *z.shape[2:], dtype=torch.float64), torch.randn_like(z)
    centred = z - mu * weight.sum([*range(1, 2 + d)]).view(-1, *[1] * d)
    (expected,) = torch.autograd.grad(centred, weight, grad_z)
    gradient = cpu_convolution.weight_gradient(grad_z, x, mu, geometry)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["weight", "input", "nothing"])
def test_layers_of_few_windows(monkeypatch: pytest.MonkeyPatch, training: bool, frozen: str):
    layer = kn.KNConv2d(256, 256, 3, padding=1, activation="relu").double().train(training)
    x = torch.randn(2, 256, 4, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    layer.weight.requires_grad_(frozen != "weight")
    inputs = [*layer.parameters(), x.requires_grad_(frozen != "input")]
    calls: list[int] = []

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        loss = layer(x).square().sum()
        return [*torch.autograd.grad(loss, [t for t in inputs if t.requires_grad])]

    weight_gradient = cpu_convolution.weight_gradient
    monkeypatch.setattr(
        cpu_convolution, "weight_gradient", lambda *a: calls.append(1) or weight_gradient(*a)
    )
    found = gradients()
    assert len(calls) == (frozen != "weight")
    monkeypatch.setattr(cpu_convolution, "product_is_faster", lambda *_: False)
    torch.testing.assert_close(found, gradients(), rtol=1e-9, atol=1e-9)


def test_many_windows_few_weights_and_groups_are_for_convolutions():
    weight = torch.zeros(256, 256, 3, 3)
    assert cpu_convolution.product_is_faster(weight, 32, 1)
    assert not cpu_convolution.product_is_faster(weight, 65, 1)
    assert not cpu_convolution.product_is_faster(weight[:128, :128], 32, 1)
    assert not cpu_convolution.product_is_faster(weight, 32, 2)
