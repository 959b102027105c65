"""What ``test_privacy_distributed.py`` has two processes do; torchrun starts them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import Tensor, nn
from torch.optim import SGD

import kernelnorm as kn
from kernelnorm.privacy import PrivacyEngine
from tests.per_sample import loader

SPLITS = [(4, 3), (5, 0), (0, 2), (0, 0)]
"""The samples of each process in each step."""


def network(seed: int) -> nn.Module:
    """Without dropout, whose masks depend on a sample's place in the batch."""
    torch.manual_seed(seed)
    return nn.Sequential(
        kn.KNConv2d(2, 6, 3, dropout_p=0, activation="relu"),
        kn.KNConv2d(6, 4, 3, dropout_p=0),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


def dataset() -> Tensor:
    return torch.randn(28, 2, 7, 7, generator=torch.Generator().manual_seed(0)).double()


def batches(rank: int | None) -> list[Tensor]:
    """Those of a process, or of both together."""
    result = []
    for (first, second), part in zip(SPLITS, dataset().split(7), strict=True):
        parts = part[: first + second].split((first, second))
        result.append(part[: first + second] if rank is None else parts[rank])
    return result


def train(module: nn.Module, rank: int | None, noise: float, reduction: str) -> dict[str, Any]:
    """The gradient of each step, the weights after the last, and what was accounted and drawn."""
    engine = PrivacyEngine(accountant="rdp")
    module, optimizer, drawn = engine.make_private(
        module=module,
        optimizer=SGD(module.parameters(), lr=0.5, momentum=0.9),
        data_loader=loader(dataset(), 7),
        noise_multiplier=noise,
        max_grad_norm=0.1,
        loss_reduction=reduction,
        noise_generator=torch.Generator().manual_seed(rank or 0),
    )
    gradients = []
    for x in batches(rank):
        optimizer.zero_grad()
        y = (x[:, 0, 0, 0] > 0).long()
        F.cross_entropy(module(x), y, reduction=reduction).backward()
        optimizer.step()
        gradients.append([p.grad.clone() for p in module.parameters()])
    return {
        "gradients": gradients,
        "weights": [p.detach() for p in module.parameters()],
        "history": engine.accountant.history,
        "drawn": torch.cat([x for x, _ in drawn])[:, 0, 0, 0],
    }


def step_with_a_bad_sample(module: nn.Module, bad: bool) -> str:
    """The error of a step, in which a process may have a sample that is not finite."""
    module, optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
        module=module,
        optimizer=SGD(module.parameters(), lr=0.5),
        data_loader=loader(dataset(), 7),
        noise_multiplier=1.0,
        max_grad_norm=0.1,
    )
    x = dataset()[:4]
    x[1] = float("nan") if bad else 0
    module(x).square().sum(1).mean().backward()
    try:
        optimizer.step()
    except FloatingPointError as error:
        return str(error)
    return ""


def main(out: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    results = {}
    for noise in (0.0, 2.0):
        for reduction in ("mean", "sum"):
            module = DifferentiallyPrivateDistributedDataParallel(network(rank))
            results[noise, reduction] = train(module, rank, noise, reduction)
    torch.save(results, out / f"{rank}.pt")
    module = DifferentiallyPrivateDistributedDataParallel(network(rank))
    (out / f"{rank}.txt").write_text(step_with_a_bad_sample(module, bad=rank == 1))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads outlive the group, and can abort an interpreter that is ending


if __name__ == "__main__":
    main(Path(sys.argv[1]))
