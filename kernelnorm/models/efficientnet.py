"""EfficientNet-B0 (M. Tan and Q. Le, "EfficientNet", ICML 2019).

With ``norm="batch"`` the parameters have the names, the order and the shapes of torchvision's.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernelnorm.arguments import check_counts, check_probability
from kernelnorm.models.blocks import Layers, layers_for
from kernelnorm.models.initialisation import init_convolutions
from kernelnorm.models.inverted_residual import InvertedResidual
from kernelnorm.models.rules import Rules
from kernelnorm.models.squeeze_excite import SqueezeExcite

STEM = 32
"""The channels of the first convolution."""

STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""Of each stage: the expansion in its blocks, kernel size, first stride, channels, and blocks."""


class StochasticDepth(nn.Module):
    """Sets whole samples to 0 in training, and scales the others to keep the expectation.

    Before the addition of a residual block, it makes these samples skip the block.

    Source: G. Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.

    Args:
        p: the probability of a sample to be set to 0, from 0 to below 1

    Shape:
        ``(n, c, h, w)`` to the same.

    Raises:
        ValueError: if ``p`` is out of its range, or the input has no batch.

    Example::

        >>> import torch
        >>> y = StochasticDepth(0.5)(torch.ones(100, 1, 1, 1))
        >>> sorted(set(y.flatten().tolist()))
        [0.0, 2.0]
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        check_probability("p", p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, in training with some samples set to 0."""
        if x.dim() != 4:
            raise ValueError(f"expected a batch (n, c, h, w), got an input of {tuple(x.shape)}")
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.p
        return x * (kept / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the arguments, as ``print`` shows them."""
        return f"p={self.p}"


class MBConv(InvertedResidual):
    """An inverted residual block with SiLUs and a gate. In training, some samples skip the block.

    Args:
        expansion: the channels of the depthwise convolution, in multiples of ``in_channels``
        drop: the probability that a sample skips the block
        layers, in_channels, out_channels, kernel_size, stride: those of :class:`InvertedResidual`
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        out_channels: int,
        expansion: int,
        kernel_size: int,
        stride: int,
        drop: float,
    ) -> None:
        width = in_channels * expansion
        gate = partial(SqueezeExcite, width, max(1, in_channels // 4), nn.SiLU, nn.Sigmoid)
        super().__init__(
            layers, in_channels, width, out_channels, kernel_size, stride, nn.SiLU, gate
        )
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, at ``1 / stride`` of the resolution."""
        y: Tensor = self.block(x)
        return self.stochastic_depth(y) + x if self.residual else y


class EfficientNet(nn.Module):
    """A stem, seven stages of :class:`MBConv`, a 1x1 convolution, pooling and a linear layer.

    Args:
        norm, num_classes, in_channels, small_images, rules, dropout, stochastic_depth: see
            :func:`efficientnet_b0`
    """

    def __init__(
        self,
        norm: str,
        num_classes: int,
        in_channels: int,
        small_images: bool,
        rules: Rules | Mapping[str, Any] | None,
        dropout: float,
        stochastic_depth: float,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_probability("stochastic_depth", stochastic_depth)
        layers = layers_for(
            norm, rules, family="efficientnet", unused={"residual_relu": "EfficientNet has no ReLU"}
        )
        conv = layers.conv_norm_activation
        stem_stride = 1 if small_images else 2
        features = nn.Sequential(conv(in_channels, STEM, 3, stem_stride, activation=nn.SiLU))

        channels, blocks, total = STEM, 0, sum(depth for *_, depth in STAGES)
        for stage, (expansion, kernel_size, first_stride, width, depth) in enumerate(STAGES, 1):
            row = nn.Sequential()
            for index in range(depth):
                stride = first_stride if index == 0 and not (small_images and stage == 2) else 1
                drop = stochastic_depth * blocks / total
                row.append(MBConv(layers, channels, width, expansion, kernel_size, stride, drop))
                channels, blocks = width, blocks + 1
            features.append(row)

        last = 4 * channels
        features.append(conv(channels, last, 1, activation=nn.SiLU, before_head=True))
        self.features = features
        self.head = layers.head(nn.SiLU)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        classifier = nn.Linear(last, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), classifier)
        init_convolutions(self, mode="fan_out", fan_of_group=layers.fan_of_group)
        nn.init.zeros_(classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, shape ``(n, num_classes)``."""
        x = self.head(self.features(x))
        scores: Tensor = self.classifier(self.avgpool(x).flatten(1))
        return scores


def efficientnet_b0(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
    dropout: float = 0.2,
    stochastic_depth: float = 0.2,
) -> EfficientNet:
    """EfficientNet-B0.

    With the kernel norm all convolutions are KNConvs, also the depthwise ones, except those of the
    squeeze-and-excite gates, which are the same under every norm. For the reasons, and learning
    rates to start from, see ``docs/results/depthwise.md``.

    Args:
        norm: one of ``kernelnorm.norms.NORMS``
        num_classes: the size of the output
        in_channels: the channels of the images
        small_images: for images of about 32x32, stride 1 in place of 2 in the first convolution and
            in the second stage
        rules: for the kernel norm, other rules than the paper's: a
            :class:`~kernelnorm.models.Rules`, or a mapping with fields of it
        dropout: the dropout before the linear layer
        stochastic_depth: the probability that a sample skips a residual block; it rises linearly
            from 0 in the first block, and the last block is one step below this value

    Shape:
        ``(n, in_channels, h, w)`` to ``(n, num_classes)``.

    Example::

        >>> import torch
        >>> network = efficientnet_b0(num_classes=10, small_images=True)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return EfficientNet(
        norm, num_classes, in_channels, small_images, rules, dropout, stochastic_depth
    )
