"""Small networks in private training, and a step of one without noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("opacus")

from torch.optim import SGD

import kernelnorm as kn
from kernelnorm.privacy import PrivacyEngine
from tests.per_sample import (
    SEED,
    loader,
    reduced,
)


def classification(y: Tensor) -> Tensor:
    """The cross-entropy of each sample; sample i has label i modulo the classes."""
    labels = torch.arange(len(y)) % y.shape[1]
    return F.cross_entropy(y, labels, reduction="none")


def private(network: nn.Module, x: Tensor, batch_size: int | None = None, **options: Any) -> Any:
    """The network, optimizer and loader that ``make_private`` returns."""
    options = {"noise_multiplier": 0.0, "max_grad_norm": 0.5, **options}
    return PrivacyEngine(accountant="rdp").make_private(
        module=network,
        optimizer=SGD(network.parameters(), lr=0.1),
        data_loader=loader(x, batch_size or max(len(x), 1)),
        **options,
    )


def step(network: nn.Module, optimizer: Any, x: Tensor, reduction: str = "mean") -> None:
    """Without noise, after which the parameters have the sum in ``summed_grad``."""
    optimizer.zero_grad()
    torch.manual_seed(SEED)
    reduced(classification(network(x)), reduction).backward()
    optimizer.step()


def small(p: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        kn.KNConv2d(3, 8, 3, padding=1, dropout_p=p, activation="relu"),
        kn.KNConv2d(8, 6, 3, stride=2, groups=2, dropout_p=p, activation=nn.SiLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def images(n: int, size: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
