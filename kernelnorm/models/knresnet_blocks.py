"""The layers and blocks of KNResNets, with the activation before each KNConv."""

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor, nn

from kernelnorm.arguments import Evaluation
from kernelnorm.modules import KernelNorm2d, KNConv2d


class Layers(NamedTuple):
    """Makes the layers of a network, with the options that they share.

    Args:
        dropout_p: the dropout of all KNConvs
        evaluation: the ``evaluation`` of all kernel layers, see :class:`kernelnorm.KNConv2d`
        activation: makes the activation before each KNConv except the stem
    """

    dropout_p: float
    evaluation: Evaluation
    activation: type[nn.Module] = nn.ReLU

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        activated: bool = False,
    ) -> KNConv2d:
        """Return a KNConv with a bias and, if ``activated``, with the activation on its output."""
        return KNConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dropout_p=self.dropout_p,
            activation=self.activation() if activated else None,
            evaluation=self.evaluation,
        )

    def head(self, dropout_p: float) -> nn.Sequential:
        """Return the KernelNorm and the activation before the final average pooling."""
        norm = KernelNorm2d(1, 1, dropout_p=dropout_p, evaluation=self.evaluation)
        return nn.Sequential(norm, self.activation())


class Residual(nn.Sequential):
    """Adds the input to the output of the layers; nothing follows the addition."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the output of the layers."""
        y = x
        for layer in self:
            y = layer(y)
        return x + y


class Stage(NamedTuple):
    """Residual blocks of one shape.

    Args:
        depth: the number of blocks
        channels: the channels of their input and output
        inner: the channels between their KNConvs
        kernel_size: the kernel size of the first and the last KNConv of a bottleneck and of the
            transition to the stage, 2 or 1
    """

    depth: int
    channels: int
    inner: int
    kernel_size: int = 2


def basic_block(layers: Layers, stage: Stage) -> Residual:
    """A residual block of two 2x2 KNConvs.

    The first KNConv makes the map one pixel larger by its padding, and the second makes it one
    pixel smaller. The activation between the two is part of the first KNConv. The activation before
    them is a layer of its own, since the shortcut does not have it.
    """
    return Residual(
        OrderedDict[str, nn.Module](
            act=layers.activation(),
            conv1=layers.conv(stage.channels, stage.inner, 2, padding=1, activated=True),
            conv2=layers.conv(stage.inner, stage.channels, 2),
        )
    )


def bottleneck(layers: Layers, stage: Stage) -> Residual:
    """A residual block of 2x2, 3x3 and 2x2 KNConvs, or of 1x1, 3x3 and 1x1 KNConvs."""
    size = stage.kernel_size
    return Residual(
        OrderedDict[str, nn.Module](
            act=layers.activation(),
            conv1=layers.conv(stage.channels, stage.inner, size, padding=size - 1, activated=True),
            conv2=layers.conv(stage.inner, stage.inner, 3, padding=1, activated=True),
            conv3=layers.conv(stage.inner, stage.channels, size),
        )
    )


def transition(
    layers: Layers, in_channels: int, stage: Stage, padding: tuple[int, int, int, int]
) -> nn.Sequential:
    """The activation, a KNConv to the channels of the next stage and 2x2 max-pooling.

    The padding (left, right, top, bottom) of a 2x2 KNConv is a layer of its own, since a
    convolution pads opposite sides alike. Padded zeros are elements of the windows either way.
    """
    step = OrderedDict[str, nn.Module](act=layers.activation())
    if stage.kernel_size > 1:
        step["pad"] = nn.ZeroPad2d(padding)
    step["conv"] = layers.conv(in_channels, stage.channels, stage.kernel_size)
    step["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(step)
