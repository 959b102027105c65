"""VGG8, the shallow network of the paper's CIFAR-10 study."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kernelnorm.arguments import check_counts
from kernelnorm.models.blocks import layers_for
from kernelnorm.models.initialisation import init_convolutions
from kernelnorm.models.rules import Rules
from kernelnorm.norms import describe

_NO_HEAD = "VGG8 has no KernelNorm before its average pooling"
_UNUSED = {
    "residual_relu": "VGG8 has no additions",
    "head": _NO_HEAD,
    "head_dropout_p": _NO_HEAD,
}


class VGG8(nn.Module):
    """Five 3x3 convolutions, average pooling and a linear layer: see :func:`vgg8`."""

    def __init__(
        self,
        norm: str,
        num_classes: int,
        in_channels: int,
        width: float,
        rules: Rules | Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        if not hasattr(width, "__float__") or not 0 < width < math.inf:
            raise ValueError(f"width must be a positive, finite number, got {width!r}")
        layers = layers_for(norm, rules, family="vgg", unused=_UNUSED)
        channels = in_channels
        features: list[nn.Module] = []
        for base, pooled in ((64, True), (128, True), (256, True), (512, False), (512, False)):
            previous, channels = channels, max(1, round(base * width))
            features += [
                layers.conv(previous, channels, 3, padding=1),
                layers.norm(channels),
                layers.relu(),
            ]
            if pooled:
                features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        if describe(norm).bias:  # PyTorch's first weights would give all images the same scores
            init_convolutions(self, "fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, shape ``(n, num_classes)``."""
        scores: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return scores


def vgg8(
    norm: str = "kernel",
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    rules: Rules | Mapping[str, Any] | None = None,
) -> VGG8:
    """VGG8, as in Table 3 of the paper.

    Five 3x3 convolutions of 64, 128, 256, 512 and 512 channels, each with its norm and ReLU, the
    first three followed by 2x2 max-pooling; average pooling; a linear layer. The convolutions have
    a bias with the kernel norm and with the norms that have no shift (``none``, ``lrn``,
    ``weight_norm``, ``nf``). With the latter, weights are initialised as He et al. (2015) do; with
    all other norms, as PyTorch does. As in the paper, the kernel normalised network has no
    KernelNorm before the average pooling.

    Args:
        norm: one of ``kernelnorm.norms.NORMS``
        num_classes: the size of the output
        in_channels: the channels of the images
        width: multiplies the channels of every convolution
        rules: for the kernel norm, other rules than the paper's: a
            :class:`~kernelnorm.models.Rules`, or a mapping with fields of it

    Shape:
        ``(n, in_channels, h, w)``, ``h`` and ``w`` at least 8, to ``(n, num_classes)``.

    Example::

        >>> import torch
        >>> vgg8(norm="group", width=0.25)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return VGG8(norm, num_classes, in_channels, width, rules)
