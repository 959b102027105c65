"""A sample's share of the clipped sum is at most the clipping norm, also after rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("opacus")

import kernelnorm as kn
from kernelnorm.norms import WSConv2d
from kernelnorm.privacy import gradients
from tests.bookkeeping import private

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off")

LAYERS = {
    "kernel": partial(kn.KNConv2d, 64, 64, 3, dropout_p=0, bias=False),
    "grouped": partial(kn.KNConv2d, 64, 64, 3, groups=4, dropout_p=0, bias=False, padding=1),
    "dropout": partial(kn.KNConv2d, 64, 64, 3, bias=False),
    "standardised": partial(WSConv2d, 64, 64, 3, bias=False),
    "convolution": partial(nn.Conv2d, 64, 64, 3, bias=False),
}


def share(layer: nn.Module, x: Tensor, factor: float) -> float:
    """The norm of the clipped sum of one sample, for a clipping norm of 1."""
    network, optimizer, *_ = private(nn.Sequential(layer, nn.Flatten()), x, max_grad_norm=1.0)
    optimizer.zero_grad()
    y = network(x)
    (factor * y * torch.ones_like(y)).sum(1).mean().backward()
    optimizer.step()
    gradient: Tensor = next(layer.parameters()).summed_grad  # type: ignore[attr-defined]
    return float(gradient.double().norm())


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_nearly_constant_images(name: str, ghost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their windows have hardly any variance: large terms cancel in the gradient of a KNConv."""
    monkeypatch.setattr(gradients, "ghost_is_faster", lambda product, kept: ghost)
    monkeypatch.setattr(gradients, "is_kept", lambda product: False)
    make: Callable[[], nn.Module] = LAYERS[name]
    for value in (0.3, 1.0, 255.0):
        for noise in (0.0, 1e-4):
            for factor in (1.0, 1000.0):
                torch.manual_seed(0)
                x = value + noise * torch.randn(1, 64, 8, 8)
                assert share(make(), x, factor) < 1 + 1e-5, (value, noise, factor)


def test_ordinary_images_are_clipped_to_the_clipping_norm() -> None:
    for make in LAYERS.values():
        torch.manual_seed(0)
        assert 1 - 1e-4 < share(make(), torch.randn(1, 64, 8, 8), 1000.0) < 1 + 1e-5
