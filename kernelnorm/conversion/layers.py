"""Layers that only converted networks have."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kernelnorm.modules import KNConv2d

__all__ = ["Copy", "KNConv2dSame"]


class Copy(nn.Module):
    """Returns a copy of its input, so that the network can change the copy in place.

    A KNConv with a ReLU needs its own output unchanged in the backward pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Copy the input."""
        return input.clone()


class KNConv2dSame(KNConv2d):
    """A KNConv with TensorFlow's "same" padding; the end gets the larger half of an odd padding."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad the input, and convolve its normalised windows."""
        sides: list[int] = []
        for size, k, stride, dilation in zip(
            reversed(input.shape[-2:]),
            reversed(self.kernel_size),
            reversed(self.stride),
            reversed(self.dilation),
            strict=True,
        ):
            total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
            sides += [total // 2, total - total // 2]
        return super().forward(F.pad(input, sides))
