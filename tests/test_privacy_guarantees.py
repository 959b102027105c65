"""What the guarantee rests on: the accountant, the noise and the sampling, all of them Opacus'."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("opacus")

from opacus.accountants import create_accountant
from opacus.accountants.analysis.rdp import compute_rdp
from torch.optim import SGD

import kernelnorm as kn
from kernelnorm.privacy import PrivacyEngine
from tests.per_sample import loader

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off")

DELTA = 1e-5
MNIST = 60_000

PUBLISHED = [
    # sampling rate, noise multiplier, steps, published epsilon at delta = 1e-5
    pytest.param(0.01, 4.0, 10_000, 1.26, id="Abadi et al. 2016, arXiv:1607.00133"),
    pytest.param(256 / MNIST, 1.12, 60 * MNIST // 256, 2.92, id="TensorFlow Privacy's tutorial"),
    pytest.param(256 / MNIST, 1.2, 10 * MNIST // 256, 1.20, id="its table, 10 epochs"),
]


def training(x: torch.Tensor, batch_size: int, width: int = 4, **options: Any) -> tuple[Any, ...]:
    """An engine, and the network, optimizer and loader that it made private."""
    torch.manual_seed(0)
    network = nn.Sequential(
        kn.KNConv2d(1, width, 3, activation="relu"), nn.Flatten(), nn.LazyLinear(2)
    )
    network(x[:1])
    engine = PrivacyEngine(accountant=options.pop("accountant", "rdp"))
    made = engine.make_private(
        module=network,
        optimizer=SGD(network.parameters(), lr=1.0),
        data_loader=loader(x, batch_size),
        max_grad_norm=options.pop("max_grad_norm", 1.0),
        **options,
    )
    return engine, *made


def step(network: nn.Module, optimizer: Any, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    network(x).square().sum(1).mean().backward()
    optimizer.step()


@pytest.mark.parametrize(("rate", "noise", "steps", "published"), PUBLISHED)
def test_epsilon_is_the_published_one(
    rate: float, noise: float, steps: int, published: float
) -> None:
    """With the conversion of their time; today's gives less, and the PRV accountant less again."""
    orders = list(range(2, 65))
    divergences = compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
    converted = [d - math.log(DELTA) / (a - 1) for d, a in zip(divergences, orders, strict=True)]
    assert min(converted) == pytest.approx(published, abs=0.005)
    accountant = create_accountant("rdp")
    accountant.history = [(noise, rate, steps)]
    assert 0.7 * published < accountant.get_epsilon(DELTA) < published


@pytest.mark.parametrize("mechanism", ["rdp", "prv"])
@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_accountant_counts_the_steps(mechanism: str) -> None:
    x = torch.randn(20, 1, 5, 5)
    engine, network, optimizer, _ = training(x, 5, noise_multiplier=1.5, accountant=mechanism)
    for _ in range(6):
        step(network, optimizer, x[:4])
    assert engine.accountant.history == [(1.5, 0.25, 6)]
    reference = create_accountant(mechanism)
    reference.history = [(1.5, 0.25, 6)]
    assert engine.get_epsilon(DELTA) == reference.get_epsilon(DELTA)


@pytest.mark.parametrize("batch", [0, 7])
def test_noise_is_the_multiplier_times_the_bound(batch: int) -> None:
    """Over 100,000 parameters; what is left when the clipped gradients are taken off is noise."""
    x = torch.randn(40, 1, 40, 40)
    _, network, optimizer, _ = training(x, 10, width=64, noise_multiplier=3.0, max_grad_norm=0.2)
    step(network, optimizer, x[:batch])
    noise = torch.cat([(p.grad * 10 - p.summed_grad).flatten() for p in network.parameters()])
    count = noise.numel()
    assert count > 100_000
    # Each within five standard errors.
    assert abs(noise.mean().item()) < 5 * 0.6 / count**0.5
    assert noise.std().item() == pytest.approx(0.6, rel=5 / (2 * count) ** 0.5)
    within = (noise.abs() < 0.6).double().mean().item()
    assert within == pytest.approx(0.6827, abs=5 * 0.5 / count**0.5)


def test_noise_of_two_steps_is_independent() -> None:
    x = torch.randn(4, 1, 40, 40)
    _, network, optimizer, _ = training(x, 2, width=64, noise_multiplier=1.0)
    noises = []
    for _ in range(2):
        step(network, optimizer, x[:0])
        noises.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    correlation = torch.corrcoef(torch.stack(noises))[0, 1].item()
    assert abs(correlation) < 5 / len(noises[0]) ** 0.5


def test_batches_are_poisson_samples() -> None:
    """Each sample is in each batch with the sampling rate, and independently of the others."""
    torch.manual_seed(0)
    samples, rate = 50, 0.1
    x = torch.arange(float(samples)).view(-1, 1, 1, 1).expand(-1, 1, 3, 3)
    _, _, _, batches = training(x, 5, noise_multiplier=1.0)
    assert batches.sample_rate == rate
    drawn = [batch[:, 0, 0, 0].long() for _ in range(60) for batch, _ in batches]
    member = torch.stack([torch.zeros(samples).index_fill(0, batch, 1.0) for batch in drawn])
    assert len(member) == 600
    assert all(len(batch.unique()) == len(batch) for batch in drawn)
    sizes = member.sum(1)
    spread = (samples * rate * (1 - rate)) ** 0.5
    assert sizes.mean().item() == pytest.approx(5, abs=5 * spread / 600**0.5)
    assert sizes.std().item() == pytest.approx(spread, rel=0.2)
    of_samples = member.mean(0)
    assert (of_samples - rate).abs().max().item() < 5 * (rate * (1 - rate) / 600) ** 0.5
    correlations = torch.corrcoef(member.T).fill_diagonal_(0)
    assert correlations.abs().max().item() < 6 / 600**0.5


def test_empty_batches_take_a_step_of_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 1, 5, 5)
    engine, network, optimizer, batches = training(x, 1, noise_multiplier=1.0)
    sizes = []
    for _ in range(4):
        for batch, _ in batches:
            before = [p.detach().clone() for p in network.parameters()]
            step(network, optimizer, batch)
            sizes.append(len(batch))
            assert all(p.isfinite().all() for p in network.parameters())
            assert not any(map(torch.equal, before, network.parameters()))
    assert 0 in sizes
    assert 1 in sizes
    assert engine.accountant.history[0][2] == len(sizes)
