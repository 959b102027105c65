"""The forward and backward passes of a private step: one of each, and finite gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("opacus")

from torch.utils.checkpoint import checkpoint

from tests.bookkeeping import classification, images, private, small

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def test_gradients_are_not_accumulated() -> None:
    network, optimizer, _ = private(small(), images(2))
    x = images(2, dtype=torch.float32)
    classification(network(x)).mean().backward()
    with pytest.raises(RuntimeError, match="second forward pass before"):
        network(x)
    optimizer.zero_grad()
    loss = classification(network(x)).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass through layer"):
        loss.backward()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        y: Tensor = self.second(x)
        return self.first(x) + y if both else y


@pytest.mark.parametrize("both", [False, True])
def test_two_forward_passes_before_one_backward_pass_are_refused(both: bool) -> None:
    """Each pass would count as a sample of its own, but be clipped as one."""
    x = torch.randn(4, 3)
    network, _, _ = private(Branches(), x)
    loss = (network(x, both=True) + network(x.flip(0), both=both)).mean()
    with pytest.raises(RuntimeError, match="of another forward pass than the gradients so far"):
        loss.backward()


def test_a_forward_pass_that_is_only_looked_at_does_no_harm() -> None:
    x = torch.randn(4, 3)
    sums = []
    for looks in (False, True):
        torch.manual_seed(0)
        network, optimizer, _ = private(Branches(), x)
        loss = network(x, both=True).sum(1).mean()
        if looks:
            network(x[:3], both=False)
        loss.backward()
        optimizer.step()
        sums.append([p.summed_grad for p in network.parameters()])
    for one, other in zip(*sums, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_whose_gradient_is_not_finite_is_refused(value: float) -> None:
    x = torch.ones(4, 3)
    x[2, 1] = value
    network, optimizer, _ = private(nn.Sequential(nn.Linear(3, 2)), x)
    network(x).mean().backward()
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(FloatingPointError, match="gradient of sample 2 of the batch is not finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    optimizer.zero_grad()
    network(torch.ones(4, 3)).mean().backward()
    optimizer.step()


def test_a_sample_whose_norm_overflows_does_not_count() -> None:
    x = torch.ones(4, 3)
    sums = []
    for factor in (1e25, 0.0):
        torch.manual_seed(0)
        network, optimizer, _ = private(nn.Sequential(nn.Linear(3, 2, bias=False)), x)
        (network(x).sum(1) * torch.tensor([1.0, factor, 1, 1])).mean().backward()
        optimizer.step()
        sums.append(next(network.parameters()).summed_grad)
    assert torch.equal(*sums)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = small(p=0), reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layers, x, use_reentrant=self.reentrant)
        return y


def test_activation_checkpointing_that_is_reentrant() -> None:
    x = images(4, dtype=torch.float32).requires_grad_()
    sums = []
    for module in (small(p=0), Checkpointed(reentrant=True)):
        network, optimizer, _ = private(module, x.detach())
        classification(network(x)).mean().backward()
        optimizer.step()
        sums.append([p.summed_grad for p in network.parameters()])
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one, other)
    network, _, _ = private(Checkpointed(reentrant=False), x.detach())
    with pytest.raises(NotImplementedError, match="or use_reentrant=True"):
        classification(network(x)).mean().backward()
