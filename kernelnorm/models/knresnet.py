"""KNResNets, the residual networks that the paper's authors designed around KNConv.

They are not ResNets with other layers, as :mod:`kernelnorm.models.resnet` builds them: most windows
are 2x2, the ReLU comes before each KNConv instead of after it, and between the stages are
transitions with max-pooling instead of strided convolutions. They exist with the kernel norm only.
"""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from kernelnorm.arguments import Evaluation, check_counts, check_probability
from kernelnorm.models.initialisation import init_convolutions
from kernelnorm.models.knresnet_blocks import (
    Layers,
    Residual,
    Stage,
    basic_block,
    bottleneck,
    transition,
)
from kernelnorm.models.stem import stem


class KNResNet(nn.Module):
    """A stem, four stages with transitions between, a KernelNorm, pooling and a linear layer.

    Args:
        block: :func:`basic_block` or :func:`bottleneck`
        stages: the stages; the stem has the channels of the first
        last: the channels of a KNConv after the stages and another max-pooling; 0 for none
        dropout_p, num_classes, in_channels, small_images, evaluation: see :func:`knresnet18`
    """

    def __init__(
        self,
        block: Callable[[Layers, Stage], Residual],
        stages: tuple[Stage, Stage, Stage, Stage],
        last: int,
        dropout_p: float,
        num_classes: int,
        in_channels: int,
        small_images: bool,
        evaluation: Evaluation,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        layers = Layers(dropout_p, evaluation)
        one, two, three, four = stages
        self.stem, self.maxpool = stem(layers.conv, in_channels, one.channels, small_images)

        def blocks(stage: Stage) -> nn.Sequential:
            return nn.Sequential(*(block(layers, stage) for _ in range(stage.depth)))

        last_padding = (1, 0, 1, 0) if small_images else (2, 1, 2, 1)
        self.stage1 = blocks(one)
        self.transition1 = transition(layers, one.channels, two, (1, 0, 1, 0))
        self.stage2 = blocks(two)
        self.transition2 = transition(layers, two.channels, three, (0, 1, 0, 1))
        self.stage3 = blocks(three)
        self.transition3 = transition(layers, three.channels, four, last_padding)
        self.stage4 = blocks(four)

        self.last = nn.Sequential()
        if last:
            self.last.add_module("pool", nn.MaxPool2d(2))
            self.last.add_module("act", layers.activation())
            conv = layers.conv(four.channels, last, 2, padding=1 if small_images else 0)
            self.last.add_module("conv", conv)
        self.head = layers.head(min(5 * dropout_p, 0.25))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last or four.channels, num_classes)
        init_convolutions(self, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, shape ``(n, num_classes)``."""
        x = self.stage1(self.maxpool(self.stem(x)))
        x = self.stage2(self.transition1(x))
        x = self.stage3(self.transition2(x))
        x = self.stage4(self.transition3(x))
        scores: Tensor = self.fc(self.avgpool(self.head(self.last(x))).flatten(1))
        return scores


def knresnet18(
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    dropout_p: float = 0.05,
    evaluation: Evaluation = "expected",
) -> KNResNet:
    """KNResNet-18.

    11,685,220 parameters (11,677,540 with ``small_images``), for 1000 classes. Convolutions are
    initialised as He et al. (2015) do (fan out), their biases with 0.

    Args:
        num_classes: the size of the output
        in_channels: the channels of the images
        small_images: for images of about 32x32: a stem of a 3x3 convolution of stride 1 and no
            max-pooling, in place of the 7x7 convolution of stride 2 and the max-pooling; less
            padding in the last transition and more in the last convolution
        dropout_p: the dropout of all KNConvs; the KernelNorm before the final average pooling has
            five times as much, at most 0.25
        evaluation: the ``evaluation`` of all kernel layers, see :class:`kernelnorm.KNConv2d`. The
            authors evaluated with ``"monte_carlo"``

    Shape:
        ``(n, in_channels, h, w)`` to ``(n, num_classes)``; ``h`` and ``w`` at least 93, or 16 with
        ``small_images``.

    Source: version 4 of the paper, and the authors' published code.

    Example::

        >>> import torch
        >>> network = knresnet18(num_classes=10, small_images=True)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    stages = Stage(2, 64, 256), Stage(2, 256, 256), Stage(1, 512, 512), Stage(1, 724, 724)
    return KNResNet(
        basic_block, stages, 512, dropout_p, num_classes, in_channels, small_images, evaluation
    )


def knresnet34(
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    dropout_p: float = 0.05,
    evaluation: Evaluation = "expected",
) -> KNResNet:
    """KNResNet-34, with the arguments and shapes of :func:`knresnet18`.

    21,792,830 parameters (21,785,150 with ``small_images``), for 1000 classes.
    """
    stages = Stage(4, 64, 256), Stage(5, 256, 320), Stage(3, 512, 640), Stage(2, 512, 843)
    return KNResNet(
        basic_block, stages, 512, dropout_p, num_classes, in_channels, small_images, evaluation
    )


def knresnet50(
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
    dropout_p: float = 0.05,
    evaluation: Evaluation = "expected",
) -> KNResNet:
    """KNResNet-50, with the arguments of :func:`knresnet18`.

    25,556,390 parameters (25,525,670 with ``small_images``), for 1000 classes. Its blocks are
    bottlenecks; in the last stage, and in the transition to it, KNConvs are 1x1 in place of 2x2.

    Shape:
        ``(n, in_channels, h, w)`` to ``(n, num_classes)``; ``h`` and ``w`` at least 29, or 8 with
        ``small_images``.
    """
    stages = Stage(4, 256, 64), Stage(5, 512, 128), Stage(4, 810, 201), Stage(2, 2048, 512, 1)
    return KNResNet(
        bottleneck, stages, 0, dropout_p, num_classes, in_channels, small_images, evaluation
    )


class KNResNet13(nn.Module):
    """Four stages of a KNConv and a residual block, pooling and a linear layer.

    See :func:`knresnet13`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        dropout_p: float,
        head_dropout_p: float,
        evaluation: Evaluation,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_probability("head_dropout_p", head_dropout_p)
        layers = Layers(dropout_p, evaluation, nn.Mish)

        def stage(before: int, channels: int, first: bool = False) -> nn.Sequential:
            parts = nn.Sequential()
            if not first:
                parts.add_module("act", layers.activation())
            parts.add_module("conv", layers.conv(before, channels, 3, padding=1))
            if not first:
                parts.add_module("pool", nn.MaxPool2d(2))
            block = OrderedDict[str, nn.Module](
                act=layers.activation(),
                conv1=layers.conv(channels, channels, 3, padding=1, activated=True),
                conv2=layers.conv(channels, channels, 3, padding=1),
            )
            parts.add_module("block", Residual(block))
            return parts

        self.stage1 = stage(in_channels, 64, first=True)
        self.stage2 = stage(64, 64)
        self.stage3 = stage(64, 128)
        self.stage4 = stage(128, 256)
        self.head = layers.head(head_dropout_p)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4 * 256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, shape ``(n, num_classes)``."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        scores: Tensor = self.fc(self.avgpool(self.head(x)).flatten(1))
        return scores


def knresnet13(
    num_classes: int = 10,
    in_channels: int = 3,
    dropout_p: float = 0.1,
    head_dropout_p: float = 0.5,
    evaluation: Evaluation = "expected",
) -> KNResNet13:
    """KNResNet-13, a network for small images and private training.

    2,041,034 parameters for 10 classes. For each of the widths 64, 64, 128 and 256 there is a
    KNConv and a residual block of two KNConvs, all 3x3 and, but for the first, with Mish before
    them; 2x2 max-pooling follows the KNConv of the second, third and fourth width. Then come a
    KernelNorm with windows of one pixel, Mish, average pooling to 2x2 and a linear layer. Weights
    have PyTorch's default initialisation.

    Args:
        num_classes: the size of the output
        in_channels: the channels of the images
        dropout_p: the dropout of all KNConvs
        head_dropout_p: the dropout of the KernelNorm before the final average pooling
        evaluation: the ``evaluation`` of all kernel layers, see :class:`kernelnorm.KNConv2d`

    Shape:
        ``(n, in_channels, h, w)`` to ``(n, num_classes)``; ``h`` and ``w`` at least 8.

    Source: R. Nasirigerdeh et al., "Kernel Normalized Convolutional Networks for Privacy-Preserving
    Machine Learning", SaTML 2023, and the authors' published code.

    Example::

        >>> import torch
        >>> knresnet13()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return KNResNet13(num_classes, in_channels, dropout_p, head_dropout_p, evaluation)
