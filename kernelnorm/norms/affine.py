"""The base of the norms: checks, arithmetic in float32, a scale and a shift for each channel."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from kernelnorm.arguments import check_counts, check_eps

__all__ = ["AffineNorm2d"]


class AffineNorm2d(nn.Module, ABC):
    """Normalises feature maps, then scales and shifts each channel.

    Half-precision inputs are normalised in float32. A subclass defines :meth:`normalise`.

    Args:
        channels: the channels of the input
        eps: a small number that keeps the divisor from 0
        device, dtype: of the scale (ones) and the shift (zeros)

    Shape:
        ``(n, channels, h, w)`` to the same.

    Raises:
        ValueError: if ``channels`` is no positive integer, ``eps`` is not positive, or an input has
            another shape.
        TypeError: if an input is not floating-point.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(channels=channels)
        check_eps(eps)
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Make the scale 1 and the shift 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    @abstractmethod
    def normalise(self, x: Tensor) -> Tensor:
        """Return ``x``, in float32 or float64, normalised."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised, in its own dtype."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected an input (n, {self.channels}, h, w), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point input, got {x.dtype}")
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if y.numel() > 0:
            y = self.normalise(y)
        return (y * per_channel(self.weight) + per_channel(self.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the arguments, as ``print`` shows them."""
        return f"{self.channels}, eps={self.eps:g}"


def check_group_size(channels: int, group_size: int) -> None:
    """Raise ``ValueError`` if ``group_size`` does not divide ``channels``."""
    check_counts(group_size=group_size)
    if channels % group_size:
        raise ValueError(f"group_size must divide channels = {channels}, got {group_size}")


def per_channel(x: Tensor) -> Tensor:
    """Reshape a vector with one number per channel so that it broadcasts to feature maps."""
    return x.view(-1, 1, 1)
