"""Squeeze-and-excite (J. Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018)."""

from collections.abc import Callable

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate that depends on the means of all channels.

    The gate has two 1x1 convolutions of the pooled input. They are ordinary convolutions with
    biases under every norm, since their maps have a single position.

    Args:
        channels: the channels of the input and the output
        squeezed: the channels between the two convolutions
        activation: returns the module between them
        scale: returns the module that maps the output of the second convolution to factors of about
            0 to 1

    Shape:
        ``(n, channels, h, w)`` to the same.

    Example::

        >>> import torch
        >>> SqueezeExcite(64, 16, nn.ReLU, nn.Sigmoid)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        squeezed: int,
        activation: Callable[[], nn.Module],
        scale: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()
        self.scale_activation = scale()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with each channel scaled."""
        gate: Tensor = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        gate = self.scale_activation(gate)
        return x * gate
