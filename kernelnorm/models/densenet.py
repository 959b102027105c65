"""Densely connected networks (G. Huang et al., CVPR 2017).

With ``norm="batch"`` the parameters have the names, the order and the shapes of torchvision's.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kernelnorm.arguments import check_counts
from kernelnorm.models.blocks import Layers, layers_for
from kernelnorm.models.initialisation import init_convolutions
from kernelnorm.models.rules import Rules
from kernelnorm.models.stem import stem
from kernelnorm.ops.concatenation import concatenate

BOTTLENECK = 4
"""The channels between a dense layer's two convolutions, in multiples of the growth rate."""


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution; appends the result to the input."""

    def __init__(self, layers: Layers, in_channels: int, growth: int, before_head: bool) -> None:
        super().__init__()
        width = BOTTLENECK * growth
        self.norm1 = layers.norm(in_channels)
        self.relu1 = layers.relu()
        self.conv1 = layers.conv(in_channels, width, 1)
        self.norm2 = layers.norm(width)
        self.relu2 = layers.relu()
        self.conv2 = layers.conv(width, growth, 3, padding=1, before_head=before_head)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with ``growth`` more channels."""
        y = self.conv1(self.relu1(self.norm1(x)))
        y = self.conv2(self.relu2(self.norm2(y)))
        return concatenate(x, y)


class DenseBlock(nn.Sequential):
    """Dense layers in a row."""


class Transition(nn.Sequential):
    """Norm, ReLU, 1x1 convolution to half the channels, 2x2 average pooling."""

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.norm = layers.norm(channels)
        self.relu = layers.relu()
        self.conv = layers.conv(channels, channels // 2, 1)
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Module):
    """A stem, four blocks of dense layers with transitions between, pooling and a linear layer.

    Args:
        growth: the channels that a dense layer appends
        depths: the dense layers of each block
        channels: the channels of the first convolution
        norm, num_classes, in_channels, small_images, rules: see :func:`densenet121`
    """

    def __init__(
        self,
        growth: int,
        depths: tuple[int, int, int, int],
        channels: int,
        norm: str,
        num_classes: int,
        in_channels: int,
        small_images: bool,
        rules: Rules | Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        layers = layers_for(
            norm, rules, family="densenet", unused={"residual_relu": "DenseNet has no additions"}
        )
        conv, pool = stem(layers.conv, in_channels, channels, small_images)
        features = nn.Sequential()
        features.add_module("conv0", conv)
        features.add_module("norm0", layers.norm(channels))
        features.add_module("relu0", layers.relu())
        features.add_module("pool0", pool)

        for block, depth in enumerate(depths, start=1):
            if block > 1:
                features.add_module(f"transition{block - 1}", Transition(layers, channels))
                channels //= 2
            dense = DenseBlock()
            for index in range(1, depth + 1):
                before_head = (block, index) == (4, depth)
                layer = DenseLayer(layers, channels, growth, before_head)
                dense.add_module(f"denselayer{index}", layer)
                channels += growth
            features.add_module(f"denseblock{block}", dense)

        features.add_module("norm5", layers.norm(channels))
        features.add_module("relu5", layers.relu())
        self.features = features
        self.head = layers.head()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        init_convolutions(self, mode="fan_in")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, shape ``(n, num_classes)``."""
        x = self.head(self.features(x))
        scores: Tensor = self.classifier(self.avgpool(x).flatten(1))
        return scores


def densenet121(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
) -> DenseNet:
    """DenseNet-121.

    Args:
        norm: one of ``kernelnorm.norms.NORMS``
        num_classes: the size of the output
        in_channels: the channels of the images
        small_images: a stem for images of about 32x32, a 3x3 convolution of stride 1 and no
            max-pooling, in place of the 7x7 convolution of stride 2 and the max-pooling
        rules: for the kernel norm, other rules than the paper's: a
            :class:`~kernelnorm.models.Rules`, or a mapping with fields of it

    Shape:
        ``(n, in_channels, h, w)`` to ``(n, num_classes)``; ``h`` and ``w`` at least 29, or 8 with
        ``small_images``.

    Example::

        >>> import torch
        >>> network = densenet121(norm="batch", num_classes=10)
        >>> network(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    return DenseNet(32, (6, 12, 24, 16), 64, norm, num_classes, in_channels, small_images, rules)


def densenet161(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
) -> DenseNet:
    """DenseNet-161, with the arguments of :func:`densenet121`."""
    return DenseNet(48, (6, 12, 36, 24), 96, norm, num_classes, in_channels, small_images, rules)


def densenet169(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
) -> DenseNet:
    """DenseNet-169, with the arguments of :func:`densenet121`."""
    return DenseNet(32, (6, 12, 32, 32), 64, norm, num_classes, in_channels, small_images, rules)


def densenet201(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
) -> DenseNet:
    """DenseNet-201, with the arguments of :func:`densenet121`."""
    return DenseNet(32, (6, 12, 48, 32), 64, norm, num_classes, in_channels, small_images, rules)
