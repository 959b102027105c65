"""Layers that keep the variance of a signal without normalising it, by constant factors."""

import math

from torch import Tensor, nn

__all__ = ["RELU_GAIN", "Scale", "ScaledReLU"]

RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
"""Factor that makes the variance of a ReLU 1, for normal inputs with mean 0 and variance 1."""


class Scale(nn.Module):
    """Multiplies by a constant.

    Args:
        factor: the constant

    Shape:
        Any, to the same.

    Example::

        >>> import torch
        >>> Scale(0.2)(torch.ones(2))
        tensor([0.2000, 0.2000])
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times the constant."""
        return x * self.factor

    def extra_repr(self) -> str:
        """Return the arguments, as ``print`` shows them."""
        return f"{self.factor:g}"


class ScaledReLU(nn.Module):
    r"""The ReLU of normalizer-free networks, which keeps the variance of normal inputs.

    .. math::
        y = \sqrt{\frac{2}{1 - 1/\pi}} \max(x, 0)

    Source: A. Brock et al., "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", ICLR 2021.

    Shape:
        Any, to the same.

    Example::

        >>> import torch
        >>> y = ScaledReLU()(torch.randn(100_000))
        >>> bool((y.var() - 1).abs() < 0.05)
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the ReLU of ``x``, scaled."""
        return x.relu() * RELU_GAIN
