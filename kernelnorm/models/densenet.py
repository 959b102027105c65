"""Densely connected networks (G. Huang et al., CVPR 2017).

With ``norm="batch"`` the parameters have the names, the order and the shapes of torchvision's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernelnorm import functional
from kernelnorm.models.blocks import Layers, Rules, init_convolutions, layers_for
from kernelnorm.modules import KNConv2d
from kernelnorm.ops.dense import Layer, dense_block
from kernelnorm.ops.mask import draw_keys

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
        """Returns ``x`` with ``growth`` channels more."""
        y = self.conv1(self.relu1(self.norm1(x)))
        y = self.conv2(self.relu2(self.norm2(y)))
        return torch.cat([x, y], dim=1)


class DenseBlock(nn.Sequential):
    """Dense layers in a row; those of a kernel network have one buffer for all that they append."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` with the channels that the layers append."""
        if not _may_share_a_buffer([*self.modules()]):
            for layer in self:
                x = layer(x)
            return x
        convs = [conv for conv in self.modules() if isinstance(conv, KNConv2d)]
        x = functional.autocast(x, convs[0].weight, convs[0].bias)
        layers = [_layer(conv, x) for conv in convs]
        return dense_block(x, [*zip(layers[::2], layers[1::2], strict=True)])


def _may_share_a_buffer(modules: list[nn.Module]) -> bool:
    """Whether nobody could tell the layers' own calls from one call for all of them."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and {*map(type, modules)} == {DenseBlock, DenseLayer, KNConv2d, nn.Identity}
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        and not any(m._backward_hooks or m._backward_pre_hooks for m in modules)
    )


def _layer(conv: KNConv2d, x: Tensor) -> Layer:
    shape = len(x), conv.in_channels, *x.shape[2:]
    plan = functional.plan_for(
        shape, x.dtype, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation,
        conv.groups, conv.padding_mode, conv.dropout_p, conv.training, conv.eps, conv.activation,
        conv.evaluation,
    )  # fmt: skip
    keys = draw_keys(shape, x.device) if plan.masked else None
    return Layer(conv.weight, conv.bias, keys, plan.settings)


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
        stem: the channels of the first convolution
        norm, num_classes, in_channels, small_images, rules: see :func:`densenet121`
    """

    def __init__(
        self,
        growth: int,
        depths: tuple[int, int, int, int],
        stem: int,
        norm: str,
        num_classes: int,
        in_channels: int,
        small_images: bool,
        rules: Rules | Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        layers = layers_for(norm, rules, unused={"residual_relu": "DenseNet has no additions"})
        kernel_size, stride, padding = (3, 1, 1) if small_images else (7, 2, 3)
        features = nn.Sequential()
        features.add_module("conv0", layers.conv(in_channels, stem, kernel_size, stride, padding))
        features.add_module("norm0", layers.norm(stem))
        features.add_module("relu0", layers.relu())
        features.add_module("pool0", nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1))

        channels = stem
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
        """Returns the scores of the classes, shape ``(n, num_classes)``."""
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
