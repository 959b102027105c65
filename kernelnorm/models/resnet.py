"""Residual networks (K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016).

With ``norm="batch"`` the parameters have the names, the order and the shapes of torchvision's.

Norms with an activation of their own are published in networks of pre-activated blocks (K. He et
al., "Identity Mappings in Deep Residual Networks", ECCV 2016), and so the blocks are pre-activated
here, too: the norm comes before a block's first convolution, while an identity shortcut carries
the input of the block unchanged. One more norm comes before the average pooling.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kernelnorm.arguments import check_counts
from kernelnorm.models.blocks import Layers, layers_for
from kernelnorm.models.initialisation import init_convolutions
from kernelnorm.models.rules import Rules
from kernelnorm.models.stem import stem


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or a 1x1 convolution where the shape changes."""

    expansion = 1

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        width: int,
        stride: int,
        additions: int,
        before_head: bool,
    ) -> None:
        super().__init__()
        self.preact = layers.preact(in_channels, additions)
        self.conv1 = layers.conv(in_channels, width, 3, stride, padding=1)
        self.bn1 = layers.norm(width)
        self.relu = layers.relu()
        self.conv2 = layers.conv(
            width, width, 3, padding=1, before_sum=True, before_head=before_head
        )
        self.bn2 = layers.norm(width, in_stream=True)
        self.scale = layers.branch_scale()
        self.sum_relu = layers.sum_relu()
        self.downsample = _downsample(layers, in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, at ``1 / stride`` of the resolution."""
        a = self.preact(x)
        y: Tensor = self.relu(self.bn1(self.conv1(a)))
        y = self.scale(self.bn2(self.conv2(y)))
        y = self.sum_relu(y + _shortcut(self.downsample, x, a))
        return y


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions beside the identity or a 1x1 convolution."""

    expansion = 4

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        width: int,
        stride: int,
        additions: int,
        before_head: bool,
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.preact = layers.preact(in_channels, additions)
        self.conv1 = layers.conv(in_channels, width, 1)
        self.bn1 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, stride, padding=1)
        self.bn2 = layers.norm(width)
        self.conv3 = layers.conv(width, out_channels, 1, before_sum=True, before_head=before_head)
        self.bn3 = layers.norm(out_channels, in_stream=True)
        self.scale = layers.branch_scale()
        self.relu = layers.relu()
        self.sum_relu = layers.sum_relu()
        self.downsample = _downsample(layers, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, at ``1 / stride`` of the resolution."""
        a = self.preact(x)
        y: Tensor = self.relu(self.bn1(self.conv1(a)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.scale(self.bn3(self.conv3(y)))
        y = self.sum_relu(y + _shortcut(self.downsample, x, a))
        return y


def _downsample(layers: Layers, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = layers.conv(in_channels, out_channels, 1, stride, before_sum=True)
    return nn.Sequential(conv, layers.norm(out_channels, in_stream=True))


def _shortcut(downsample: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    """Return the block's input ``x``, or its convolution, which takes the activated ``a``."""
    shortcut: Tensor = x if isinstance(downsample, nn.Identity) else downsample(a)
    return shortcut


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, average pooling and a linear layer.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`
        depths: the blocks of each stage
        norm, num_classes, in_channels, small_images, rules: see :func:`resnet18`
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        norm: str,
        num_classes: int,
        in_channels: int,
        small_images: bool,
        rules: Rules | Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        layers = layers_for(norm, rules, family="resnet")
        conv, pool = stem(layers.conv, in_channels, 64, small_images)
        self.conv1 = conv
        self.bn1 = layers.norm(64, in_stream=True)
        self.relu = layers.relu()
        self.maxpool = pool

        channels, additions = 64, 0
        stages = []
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = nn.Sequential()
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                before_head = (stage, index) == (3, depth - 1)
                blocks.append(block(layers, channels, width, stride, additions, before_head))
                projects = stride > 1 or channels != width * block.expansion
                additions = 1 if projects else additions + 1
                channels = width * block.expansion
            stages.append(blocks)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        self.postact = layers.preact(channels, additions=0)
        self.head = layers.head()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, shape ``(n, num_classes)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.head(self.postact(x))
        scores: Tensor = self.fc(self.avgpool(x).flatten(1))
        return scores


def resnet18(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
) -> ResNet:
    """ResNet-18.

    Args:
        norm: one of ``kernelnorm.norms.NORMS``
        num_classes: the size of the output
        in_channels: the channels of the images
        small_images: a stem for images of about 32x32, a 3x3 convolution of stride 1 and no
            max-pooling, in place of the 7x7 convolution of stride 2 and the max-pooling
        rules: for the kernel norm, other rules than the paper's: a
            :class:`~kernelnorm.models.Rules`, or a mapping with fields of it

    Shape:
        ``(n, in_channels, h, w)`` to ``(n, num_classes)``.

    Example::

        >>> import torch
        >>> network = resnet18(num_classes=10, small_images=True)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), norm, num_classes, in_channels, small_images, rules)


def resnet34(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
) -> ResNet:
    """ResNet-34, with the arguments of :func:`resnet18`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), norm, num_classes, in_channels, small_images, rules)


def resnet50(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
) -> ResNet:
    """ResNet-50, with the arguments of :func:`resnet18`; the stride is in the 3x3 convolutions."""
    return ResNet(Bottleneck, (3, 4, 6, 3), norm, num_classes, in_channels, small_images, rules)


def resnet101(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
) -> ResNet:
    """ResNet-101, with the arguments of :func:`resnet18`; the stride is in the 3x3 convolutions."""
    return ResNet(Bottleneck, (3, 4, 23, 3), norm, num_classes, in_channels, small_images, rules)
