"""The gradients of each sample, by autograd and one sample after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Losses = Callable[[Tensor], Tensor]
"""The loss of each sample, from the output of a network."""

SEED = 7


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def losses_of(network: nn.Module, x: Tensor, losses: Losses, seed: int = SEED) -> Tensor:
    """One forward pass of the whole batch, whose masks follow from the seed."""
    torch.manual_seed(seed)
    return losses(network(x))


def sample_gradients(
    network: nn.Module, x: Tensor, losses: Losses, seed: int = SEED
) -> list[Tensor]:
    """For each parameter the gradients of all samples, with the masks of one forward pass."""
    parameters = trained(network)
    rows = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in losses_of(network, x, losses, seed)
    ]
    if not rows:
        return [p.new_zeros((0, *p.shape)) for p in parameters]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def norms(gradients: list[Tensor]) -> Tensor:
    """The norm of each sample's gradient over all parameters."""
    return torch.cat([gradient.flatten(1) for gradient in gradients], 1).norm(dim=1)


def clipped_sums(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Clip, then add."""
    factors = (max_norm / (norms(gradients) + 1e-6)).clamp(max=1)
    return [(factors.view(-1, *[1] * (g.dim() - 1)) * g).sum(0) for g in gradients]


def reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses.mean() if reduction == "mean" else losses.sum()


def projection(y: Tensor) -> Tensor:
    """A loss of any output: for each sample a product with the same random numbers."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return (y * direction + y.square() / 2).flatten(1).sum(1)


def loader(x: Tensor, batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(x, torch.zeros(len(x)).long()), batch_size=batch_size)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to a tolerance relative to the largest value."""
    assert actual.shape == expected.shape
    scale = 1 + expected.abs().max().item() if expected.numel() else 1
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)
