"""Bookkeeping with several augmentations of a sample: one clipped gradient for all of them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("opacus")

from torch.optim import SGD

import kernelnorm as kn
from kernelnorm.models import vgg8
from kernelnorm.privacy import PrivacyEngine, gradients
from tests.per_sample import (
    SEED,
    assert_close,
    clipped_sums,
    loader,
    reduced,
    sample_gradients,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off")


def classification(y: Tensor) -> Tensor:
    return F.cross_entropy(y, torch.arange(len(y)) % y.shape[1], reduction="none")


def of_samples(network: nn.Module, x: Tensor, augmentations: int, reduction: str) -> list[Tensor]:
    """The gradients of the samples, each a reduction of those of its rows."""
    rows = sample_gradients(network, x, classification)
    shapes = [(len(x) // augmentations, augmentations, *g.shape[1:]) for g in rows]
    groups = [g.view(shape) for g, shape in zip(rows, shapes, strict=True)]
    return [g.mean(1) if reduction == "mean" else g.sum(1) for g in groups]


def sums(
    network: nn.Module,
    x: Tensor,
    augmentations: int,
    reduction: str = "mean",
    max_norm: float = 0.5,
) -> list[Tensor]:
    """The sums of the clipped gradients of a step."""
    network, optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
        module=network,
        optimizer=SGD(network.parameters(), lr=0.1),
        data_loader=loader(torch.zeros(4, 1), 4),
        noise_multiplier=0.0,
        max_grad_norm=max_norm,
        loss_reduction=reduction,
        augmentations=augmentations,
    )
    torch.manual_seed(SEED)
    reduced(classification(network(x)), reduction).backward()
    optimizer.step()
    for parameter in trained(network):
        divisor = 4 if reduction == "mean" else 1
        assert_close(parameter.grad, parameter.summed_grad / divisor)
    return [parameter.summed_grad for parameter in trained(network)]


def small(d: int) -> nn.Module:
    torch.manual_seed(0)
    layer, conv = getattr(kn, f"KNConv{d}d"), getattr(nn, f"Conv{d}d")
    return nn.Sequential(
        layer(3, 4, 3, padding=1, stride=2, dropout_p=0.5, activation="relu"),
        layer(4, 6, (2,) * (d - 1) + (1,), groups=2, dropout_p=0.5, activation=nn.SiLU()),
        conv(6, 4, 2, padding=1, dilation=2),
        nn.GroupNorm(2, 4),
        getattr(nn, f"AdaptiveAvgPool{d}d")(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_each_way_to_the_gradients(d: int, kept: bool, ghost: bool) -> None:
    """Nine samples, of which eight are one chunk, with three augmentations."""
    network, x = small(d), torch.randn(27, 3, *[7] * d).double()
    expected = clipped_sums(of_samples(network, x, 3, "mean"), 0.1)
    with (
        mock.patch.object(gradients, "ghost_is_faster", return_value=ghost),
        mock.patch.object(gradients, "is_kept", return_value=kept),
    ):
        actual = sums(network, x, 3, max_norm=0.1)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(0, 4),
    augmentations=st.integers(1, 5),
    reduction=st.sampled_from(["mean", "sum"]),
    max_norm=st.sampled_from([1e-2, 1e4]),
    channels_last=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_sample_is_clipped_once(
    seed: int,
    samples: int,
    augmentations: int,
    reduction: str,
    max_norm: float,
    channels_last: bool,
) -> None:
    network = small(2)
    torch.manual_seed(seed)
    x = torch.randn(samples * augmentations, 3, 9, 8).double()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        network = network.to(memory_format=torch.channels_last)
    expected = clipped_sums(of_samples(network, x, augmentations, reduction), max_norm)
    actual = sums(network, x, augmentations, reduction, max_norm)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("norm", ["kernel", "group"])
def test_networks(norm: str) -> None:
    torch.manual_seed(0)
    network, x = vgg8(norm, width=0.125).double(), torch.randn(6, 3, 16, 16).double()
    expected = clipped_sums(of_samples(network, x, 2, "mean"), 0.5)
    for one, other in zip(sums(network, x, 2), expected, strict=True):
        assert_close(one, other)


def test_batches_of_parts_of_samples_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"batch of 5 rows, expected a multiple of augmentations=2"
    ):
        sums(small(2), torch.randn(5, 3, 7, 7).double(), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentations": 0}, "augmentations must be an integer of at least 1, got 0"),
        ({"augmentations": 1.5}, "augmentations must be an integer of at least 1, got 1.5"),
        ({"augmentations": 2, "grad_sample_mode": "hooks"}, "'bookkeeping', got 'hooks'"),
    ],
)
def test_options(options: dict[str, object], message: str) -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        PrivacyEngine().make_private(
            module=network,
            optimizer=SGD(network.parameters(), lr=0.1),
            data_loader=loader(torch.zeros(4, 2), 2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **options,
        )
