"""Inverted residual blocks (M. Sandler et al., "MobileNetV2", CVPR 2018), with a gate."""

from collections.abc import Callable

from torch import Tensor, nn

from kernelnorm.models.blocks import Activation, Layers


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, depthwise convolution, gate, 1x1 convolution to fewer.

    There is no first convolution if ``width`` is ``in_channels``, and no activation after the last
    one. The input is added if it has the shape of the output.

    Args:
        layers: make the convolutions
        in_channels, out_channels: the channels of the input and the output
        width: the channels of the depthwise convolution
        kernel_size, stride: those of the depthwise convolution
        activation: makes the activation after each of the first two convolutions
        gate: makes the gate. Default: ``None``, no gate
    """

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        width: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        activation: Activation,
        gate: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        conv = layers.conv_norm_activation
        block = nn.Sequential()
        if width != in_channels:
            block.append(conv(in_channels, width, 1, activation=activation))
        block.append(conv(width, width, kernel_size, stride, groups=width, activation=activation))
        if gate is not None:
            block.append(gate())
        block.append(conv(width, out_channels, 1))
        self.block = block
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, at ``1 / stride`` of the resolution."""
        y: Tensor = self.block(x)
        return y + x if self.residual else y
