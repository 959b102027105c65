"""Small networks to convert, and what every conversion has to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kernelnorm

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def conv_norm_relu(in_channels: int, out_channels: int, inplace: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace),
    )


class Block(nn.Module):
    """A residual block with one ReLU module for all, and an addition in place."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.inplace:
            y += x
        else:
            y = y + x
        out: Tensor = self.relu(y)
        return out


class PreActivation(nn.Module):
    """Norm, ReLU, convolution, twice, beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        return x + y


class Calling(nn.Module):
    """Layers, and a function that calls them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def convert(model: nn.Module, x: Any = IMAGE, **options: Any) -> tuple[Any, kernelnorm.Report]:
    """Convert, and check that the result runs forward and backward with one image."""
    names = [name for name, _ in model.named_modules()]
    network, report = kernelnorm.convert(model, x, **options)
    assert type(network) is type(model)
    assert {*names} <= {name for name, _ in network.named_modules()}
    if isinstance(x, Tensor):
        network(x[:1]).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        network.zero_grad()
    return network, report


def why(report: kernelnorm.Report, name: str) -> str:
    return next(row.why for row in report.rows if row.name == name)
