"""Norms that have an activation of their own, in place of the ReLU."""

import torch
from torch import Tensor, nn

from kernelnorm.norms.affine import AffineNorm2d, check_group_size, per_channel

__all__ = ["EvoNorm2dS0", "FilterResponseNorm2d"]


class EvoNorm2dS0(AffineNorm2d):
    r"""EvoNorm-S0: a norm and its activation in one.

    .. math::
        y = \frac{x \, \sigma(v_c x)}{\sqrt{\mathrm{var}_g(x) + \epsilon}} \gamma_c + \beta_c

    with the logistic function :math:`\sigma` and the biased variance over all positions of a sample
    and over the group :math:`g` of channels that contains channel :math:`c`.

    Source: H. Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020. Without the
    activation the layer only scales and shifts, as in the authors' code.

    Args:
        channels: the channels of the input
        group_size: the channels of a group, a divisor of ``channels``. The authors take 32 groups
        activation: ``False`` replaces the fraction by :math:`x`, so
            :math:`y = x \gamma_c + \beta_c`
        eps: added to the variance
        device, dtype: of the scale :math:`\gamma` (ones), the shift :math:`\beta` (zeros) and
            :math:`v` (ones)

    Shape:
        ``(n, channels, h, w)`` to the same.

    Raises:
        ValueError: if ``group_size`` does not divide ``channels``, ``channels`` is not positive, or
            an input has another shape.

    Example::

        >>> EvoNorm2dS0(64, group_size=32)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    v: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        group_size: int,
        activation: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps, device, dtype)
        check_group_size(channels, group_size)
        self.group_size = group_size
        v = nn.Parameter(torch.ones(channels, device=device, dtype=dtype)) if activation else None
        self.register_parameter("v", v)

    def reset_parameters(self) -> None:
        """Make the scale and ``v`` 1, and the shift 0."""
        super().reset_parameters()
        if self.v is not None:
            nn.init.ones_(self.v)

    def normalise(self, x: Tensor) -> Tensor:
        """Return the fraction of the formula, or ``x`` without the activation."""
        if self.v is None:
            return x
        groups = x.unflatten(1, (-1, self.group_size))
        mean = groups.mean(dim=(2, 3, 4), keepdim=True)
        variance = (groups - mean).square().mean(dim=(2, 3, 4))  # var() warns about empty batches
        scale = torch.rsqrt(variance + self.eps).repeat_interleave(self.group_size, dim=1)
        return x * torch.sigmoid(per_channel(self.v) * x) * scale[..., None, None]

    def extra_repr(self) -> str:
        """Return the arguments, as ``print`` shows them."""
        activation = "" if self.v is not None else ", activation=False"
        return f"{super().extra_repr()}, group_size={self.group_size}{activation}"


class FilterResponseNorm2d(AffineNorm2d):
    r"""Filter response normalisation with a thresholded linear unit (FRN + TLU).

    .. math::
        y = \max\left(\frac{x}{\sqrt{\nu^2 + \epsilon}} \gamma_c + \beta_c, \tau_c\right)

    with the mean :math:`\nu^2` of :math:`x^2` over the positions of a channel in a sample; no mean
    is subtracted. On maps of one position the fraction is little more than the sign of :math:`x`.

    Source: S. Singh and S. Krishnan, "Filter Response Normalization Layer: Eliminating Batch
    Dependence in the Training of Deep Neural Networks", CVPR 2020; here with a fixed
    :math:`\epsilon`, which the authors learn for maps of one position.

    Args:
        channels: the channels of the input
        activation: ``False`` leaves out the maximum: :math:`y` is then its first argument
        eps: added to the mean square
        device, dtype: of the scale :math:`\gamma` (ones), the shift :math:`\beta` (zeros) and the
            threshold :math:`\tau` (zeros)

    Shape:
        ``(n, channels, h, w)`` to the same.

    Raises:
        ValueError: if ``channels`` is not positive, or an input has another shape.

    Example::

        >>> y = FilterResponseNorm2d(64)(torch.randn(2, 64, 8, 8))
        >>> bool(y.min() == 0)
        True
    """

    tau: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        activation: bool = True,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps, device, dtype)
        tau = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.register_parameter("tau", tau if activation else None)

    def reset_parameters(self) -> None:
        """Make the scale 1, and the shift and the threshold 0."""
        super().reset_parameters()
        if self.tau is not None:
            nn.init.zeros_(self.tau)

    def normalise(self, x: Tensor) -> Tensor:
        """Divide by the root mean square of each channel."""
        return x * torch.rsqrt(x.square().mean(dim=(2, 3), keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised and thresholded, in its own dtype."""
        y = super().forward(x)
        return y if self.tau is None else torch.maximum(y, per_channel(self.tau).to(y.dtype))

    def extra_repr(self) -> str:
        """Return the arguments, as ``print`` shows them."""
        return super().extra_repr() + ("" if self.tau is not None else ", activation=False")
