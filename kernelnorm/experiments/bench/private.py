"""Private training steps, their memory, and networks with GroupNorm to compare with."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from kernelnorm import KernelNorm2d, KNConv2d
from kernelnorm.norms import make_norm

__all__ = ["allocated_peak", "group_norm_twin", "made_private"]


def made_private(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, way: str
) -> tuple[nn.Module, Any, nn.Module]:
    """Return the network, its optimizer and the cross-entropy, for private training.

    Args:
        network: the network to train.
        optimizer: its optimizer.
        x: the batch of each step.
        way: the ``grad_sample_mode`` of :class:`kernelnorm.privacy.PrivacyEngine`.
    """
    from kernelnorm.privacy import PrivacyEngine

    made = PrivacyEngine(accountant="rdp").make_private(
        module=network,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x), batch_size=len(x)),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=way,
    )
    network, optimizer = made[:2]
    return network, optimizer, made[2] if len(made) == 4 else nn.CrossEntropyLoss()


def group_norm_twin(network: nn.Module) -> nn.Module:
    """Return a copy with GroupNorm of a network that exists with the kernel norm only.

    Each KNConv becomes a convolution without bias, GroupNorm and the activation. Each KernelNorm
    becomes an identity.
    """
    twin = copy.deepcopy(network)
    for name, layer in network.named_modules():
        if isinstance(layer, KNConv2d):
            twin.set_submodule(name, _group_norm_layers(layer))
        elif isinstance(layer, KernelNorm2d):
            twin.set_submodule(name, nn.Identity())
    return twin


def _group_norm_layers(layer: KNConv2d) -> nn.Sequential:
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    conv = nn.Conv2d(**{name: getattr(layer, name) for name in names.split()}, bias=False)
    activation = nn.ReLU() if layer.activation == "relu" else layer.activation
    rest = [activation] if isinstance(activation, nn.Module) else []
    return nn.Sequential(conv, make_norm("group", layer.out_channels), *rest)


def allocated_peak(step: Callable[[], None]) -> int:
    """Return the peak of the bytes that PyTorch allocates on the CPU during a step.

    Bytes that were allocated before the step are not counted.
    """
    with _without_messages(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        p.export_chrome_trace(str(file))
        events = json.loads(file.read_bytes())["traceEvents"]
    records = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = records[0]["Total Allocated"] - records[0]["Bytes"]
    peak: int = max(record["Total Allocated"] for record in records) - before
    return peak


@contextmanager
def _without_messages() -> Iterator[None]:
    """Silence the profiler, which writes to standard error when it starts and stops."""
    error = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(error, 2)
        os.close(error)
        os.close(nowhere)
