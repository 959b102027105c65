"""The networks of the study on CamVid, and their norms."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kernelnorm import convert
from kernelnorm.models import Rules

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "segmentation.py"))
CLASSES, HEIGHT, WIDTH = EXAMPLE["CLASSES"], EXAMPLE["HEIGHT"], EXAMPLE["WIDTH"]
Factory = Callable[[int], nn.Module]

NORMS = {
    "kernel": "kernel, converted",
    "kernel_p0": "kernel, without dropout",
    "group": "GroupNorm",
    "ws_group": "Weight Standardization, GroupNorm",
    "batch": "BatchNorm",
}
"""The norms, with their names in the tables."""


class DenseLayer(nn.Module):
    """Norm, ReLU, convolution; its output is added to the channels of its input."""

    def __init__(self, in_channels: int, growth: int, norm: Factory) -> None:
        super().__init__()
        self.norm, self.relu = norm(in_channels), nn.ReLU()
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with ``growth`` more channels."""
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], dim=1)


class FCDenseNet(nn.Module):
    """A small fully convolutional DenseNet: dense blocks down to a sixteenth, and up to a half.

    Source: S. Jegou et al., "The One Hundred Layers Tiramisu", CVPR workshops 2017; here with
    nearest-neighbour upsampling, and 1x1 convolutions that reduce the channels on the way up.
    """

    def __init__(
        self, norm: Factory = nn.BatchNorm2d, growth: int = 8, layers: int = 4, stages: int = 4
    ) -> None:
        super().__init__()
        channels = 24
        self.stem = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.blocks_down, self.blocks_up = nn.ModuleList(), nn.ModuleList()
        self.transitions_down, self.transitions_up = nn.ModuleList(), nn.ModuleList()
        skips: list[int] = []

        def block(in_channels: int) -> nn.Sequential:
            return nn.Sequential(
                *(DenseLayer(in_channels + i * growth, growth, norm) for i in range(layers))
            )

        def transition(in_channels: int, out_channels: int) -> nn.Sequential:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            return nn.Sequential(norm(in_channels), nn.ReLU(), conv)

        for stage in range(stages):
            self.blocks_down.append(block(channels))
            channels += layers * growth
            if stage < stages - 1:
                skips.append(channels)
                self.transitions_down.append(transition(channels, channels // 2))
                channels //= 2
        for skip in reversed(skips):
            self.transitions_up.append(transition(channels, layers * growth))
            channels = layers * growth + skip
            self.blocks_up.append(block(channels))
            channels += layers * growth
        self.last = nn.Sequential(norm(channels), nn.ReLU())
        self.head = nn.Conv2d(channels, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a score for each class and pixel."""
        y, skips = self.stem(x), []
        for block, down in zip(self.blocks_down, self.transitions_down, strict=False):
            skips.append(block(y))
            y = F.avg_pool2d(down(skips[-1]), 2)
        y = self.blocks_down[-1](y)
        for up, block in zip(self.transitions_up, self.blocks_up, strict=True):
            skip = skips.pop()
            y = block(torch.cat([F.interpolate(up(y), skip.shape[-2:]), skip], dim=1))
        return F.interpolate(self.head(self.last(y)), x.shape[-2:], mode="bilinear")


NETWORKS: dict[str, Callable[[Factory], nn.Module]] = {
    "unet": EXAMPLE["UNet"],
    "fcdensenet": FCDenseNet,
}


class Standardized(nn.Module):
    """Weights with mean 0 and variance 1 / n over the n inputs of an output.

    Source: S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", 2019.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardised weights."""
        deviation, mean = torch.std_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return (weight - mean) / (deviation * math.sqrt(weight[0].numel()) + 1e-5)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with groups of 8 channels, 32 groups at most."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and channels // g >= 8)
    return nn.GroupNorm(groups, channels)


def build(network: str, norm: str) -> nn.Module:
    """Return a network; its first weights depend on PyTorch's seed, not on the norm."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    built = NETWORKS[network](group_norm if norm.endswith("group") else nn.BatchNorm2d)
    if norm.startswith("kernel"):
        rules = Rules(dropout_p=0) if norm == "kernel_p0" else Rules()
        return convert(built, torch.rand(1, 3, HEIGHT, WIDTH), rules=rules)[0]
    if norm == "ws_group":
        for module in [*built.modules()]:
            if isinstance(module, nn.Conv2d) and module is not built.head:
                parametrize.register_parametrization(module, "weight", Standardized())
    return built
