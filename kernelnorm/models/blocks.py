"""The rules that make a network a KNConvNet, stated once (Section 3 of the paper).

(I)   Each convolution becomes a KNConv of the same kernel size, stride and padding, with dropout
      0.1 and a bias.
(II)  Batch normalisation goes.
(III) A ReLU follows each KNConv, except where a separate KernelNorm follows it.
(IV)  A KernelNorm of kernel size and stride 1, padding 0 and dropout 0.2, and a ReLU, stand before
      the final average pooling. (VGG8 does without.)

A network is wired once, for every norm: it asks :func:`layers_for` for its layers in the order
that the original network has them, and those that a norm has no use for are identities. By rule
III the ReLU is a part of the KNConv, so each branch of a residual block has its own and none
follows the addition, and the pre-activations of DenseNet become post-activations. The exception
is the last KNConv of ResNet and DenseNet: after the addition or the concatenation comes the
KernelNorm of rule IV.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from kernelnorm.modules import KernelNorm2d, KNConv2d
from kernelnorm.norms import make_norm


@dataclass(frozen=True)
class NormLayers:
    """The layers of a network whose convolutions are followed (or preceded) by a norm.

    The norm's shift stands for the bias of the convolutions, which have one only without a norm.
    """

    name: str

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        before_head: bool = False,
    ) -> nn.Conv2d:
        """Returns a convolution; ``before_head`` says that it is the last before :meth:`head`."""
        bias = self.name == "none"
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def norm(self, channels: int) -> nn.Module:
        """Returns the norm of a convolution's input or output."""
        return make_norm(self.name, channels)

    def relu(self) -> nn.Module:
        """Returns the activation that follows a norm or an addition."""
        return nn.ReLU()

    def head(self) -> nn.Module:
        """Returns what is added before the final average pooling."""
        return nn.Identity()


@dataclass(frozen=True)
class KernelLayers:
    """The layers of a KNConvNet: the methods of :class:`NormLayers` under rules I to IV."""

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        before_head: bool = False,
    ) -> nn.Conv2d:
        """Rule I, with the ReLU of rule III unless the KernelNorm of :meth:`head` comes next."""
        return KNConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            bias=True,
            dropout_p=0.1,
            activation=None if before_head else "relu",
        )

    def norm(self, channels: int) -> nn.Module:
        """Rule II."""
        return nn.Identity()

    def relu(self) -> nn.Module:
        """Rule III: the convolution has it."""
        return nn.Identity()

    def head(self) -> nn.Module:
        """Rule IV."""
        return nn.Sequential(KernelNorm2d(1, 1, dropout_p=0.2), nn.ReLU())


Layers = NormLayers | KernelLayers


def layers_for(norm: str) -> Layers:
    """Returns the layers of a network normalised by ``norm``, one of ``kernelnorm.norms.NORMS``."""
    return KernelLayers() if norm == "kernel" else NormLayers(norm)


def init_convolutions(network: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Draws the weights of all convolutions as He et al. (2015) do, and sets their biases to 0.

    Args:
        network: the module whose convolutions are initialised
        mode: ``"fan_in"`` keeps the variance of the activations, ``"fan_out"`` of the gradients
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
