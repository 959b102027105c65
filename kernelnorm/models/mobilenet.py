"""MobileNetV3-small (A. Howard et al., "Searching for MobileNetV3", ICCV 2019).

With ``norm="batch"`` the parameters have the names, the order and the shapes of torchvision's.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from kernelnorm.arguments import check_counts
from kernelnorm.models.blocks import Activation, layers_for
from kernelnorm.models.initialisation import init_convolutions
from kernelnorm.models.inverted_residual import InvertedResidual
from kernelnorm.models.rules import Rules
from kernelnorm.models.squeeze_excite import SqueezeExcite

STEM = 16
"""The channels of the first convolution."""

BLOCKS: tuple[tuple[int, int, int, bool, Activation, int], ...] = (
    (3, 16, 16, True, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 2),
    (3, 88, 24, False, nn.ReLU, 1),
    (5, 96, 40, True, nn.Hardswish, 2),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 240, 40, True, nn.Hardswish, 1),
    (5, 120, 48, True, nn.Hardswish, 1),
    (5, 144, 48, True, nn.Hardswish, 1),
    (5, 288, 96, True, nn.Hardswish, 2),
    (5, 576, 96, True, nn.Hardswish, 1),
    (5, 576, 96, True, nn.Hardswish, 1),
)
"""Of each block: the kernel size, the channels inside and after it, whether it has a gate, the
activation, and the stride."""


def _squeezed(width: int) -> int:
    """Return the multiple of 8 nearest to a quarter; the next one if it is below 90 % of that."""
    quarter = width / 4
    nearest = max(8, int(quarter + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * quarter else nearest + 8


class MobileNetV3(nn.Module):
    """A stem, 11 inverted residual blocks, a 1x1 convolution, pooling and two linear layers.

    Args:
        norm, num_classes, in_channels, small_images, rules, dropout: see
            :func:`mobilenet_v3_small`
    """

    def __init__(
        self,
        norm: str,
        num_classes: int,
        in_channels: int,
        small_images: bool,
        rules: Rules | Mapping[str, Any] | None,
        dropout: float,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        layers = layers_for(
            norm, rules, family="mobilenet", unused={"residual_relu": "no ReLU follows a sum"}
        )
        conv, stride = layers.conv_norm_activation, 1 if small_images else 2
        features = nn.Sequential(conv(in_channels, STEM, 3, stride, activation=nn.Hardswish))
        channels = STEM
        for index, (kernel_size, width, after, gated, activation, stride) in enumerate(BLOCKS):
            stride = 1 if small_images and index == 0 else stride
            gate = partial(SqueezeExcite, width, _squeezed(width), nn.ReLU, nn.Hardsigmoid)
            options = activation, gate if gated else None
            features.append(
                InvertedResidual(layers, channels, width, after, kernel_size, stride, *options)
            )
            channels = after
        last = 6 * channels
        features.append(conv(channels, last, 1, activation=nn.Hardswish, before_head=True))
        self.features = features
        self.head = layers.head(nn.Hardswish)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(last, 1024), nn.Hardswish(), nn.Dropout(dropout), nn.Linear(1024, num_classes)
        )
        init_convolutions(self, mode="fan_out", fan_of_group=layers.fan_of_group)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = 1e-3, 0.01  # MobileNetV3's; trained weights need it

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, shape ``(n, num_classes)``."""
        x = self.head(self.features(x))
        scores: Tensor = self.classifier(self.avgpool(x).flatten(1))
        return scores


def mobilenet_v3_small(
    norm: str = "kernel",
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    rules: Rules | Mapping[str, Any] | None = None,
    dropout: float = 0.2,
) -> MobileNetV3:
    """MobileNetV3-small.

    With the kernel norm all convolutions are KNConvs, also the depthwise ones, except those of the
    squeeze-and-excite gates, which are the same under every norm. For the reasons, and learning
    rates to start from, see ``docs/results/depthwise.md``.

    Args:
        norm: one of ``kernelnorm.norms.NORMS``
        num_classes: the size of the output
        in_channels: the channels of the images
        small_images: for images of about 32x32, stride 1 in place of 2 in the first convolution and
            in the first block
        rules: for the kernel norm, other rules than the paper's: a
            :class:`~kernelnorm.models.Rules`, or a mapping with fields of it
        dropout: the dropout before the last linear layer

    Shape:
        ``(n, in_channels, h, w)`` to ``(n, num_classes)``.

    Example::

        >>> import torch
        >>> network = mobilenet_v3_small(num_classes=10, small_images=True)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return MobileNetV3(norm, num_classes, in_channels, small_images, rules, dropout)
