"""Convolutions that normalise their weights."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["ScaledWSConv2d", "WSConv2d", "weight_norm_conv"]


class WSConv2d(nn.Conv2d):
    r"""A convolution with Weight Standardization.

    The filter of each output channel is

    .. math::
        \hat W = \frac{W - \mathrm{mean}(W)}{\sqrt{\mathrm{var}(W) + \epsilon}}

    with the biased variance over the channels and positions of that filter.

    Source: S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", 2019.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: see
            :class:`torch.nn.Conv2d`
        eps: added to the variance
        device, dtype: of the parameters

    Shape:
        Those of :class:`torch.nn.Conv2d`. The layer loads the ``state_dict`` of a ``Conv2d``.

    Example::

        >>> conv = WSConv2d(16, 32, 3)
        >>> filters = conv.effective_weight().flatten(1)
        >>> bool(filters.mean(dim=1).abs().max() < 1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.eps = eps

    def effective_weight(self) -> Tensor:
        """Return the standardised filters that the convolution uses."""
        return self.standardise(self.weight)

    def standardise(self, filters: Tensor) -> Tensor:
        """Return filters standardised, in their own dtype."""
        weight = filters.to(torch.promote_types(filters.dtype, torch.float32))
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return ((weight - mean) * self.scale_of(variance)).to(filters.dtype)

    def scale_of(self, variance: Tensor) -> Tensor:
        """Return the factor of centred filters, given their variance."""
        return torch.rsqrt(variance + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` with the standardised filters."""
        weight = self.effective_weight()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledWSConv2d(WSConv2d):
    r"""A convolution with Scaled Weight Standardization, of normalizer-free networks.

    The filter of each output channel is

    .. math::
        \hat W = g_c \frac{W - \mathrm{mean}(W)}{\sqrt{\max(N \mathrm{var}(W), \epsilon)}}

    with the :math:`N` weights of a filter and the biased variance over them. An input of
    independent elements with mean 0 and variance 1 then has an output of variance :math:`g_c^2`.

    Source: A. Brock et al., "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", ICLR 2021.

    Args:
        args, options: those of :class:`WSConv2d`
        eps: the least value of :math:`N \mathrm{var}(W)`

    Attributes:
        gain: the parameter :math:`g`, of shape ``(out_channels, 1, 1, 1)``, which starts as ones

    Shape:
        Those of :class:`torch.nn.Conv2d`.

    Example::

        >>> conv = ScaledWSConv2d(16, 32, 3)
        >>> squares = conv.effective_weight().square().sum(dim=(1, 2, 3))
        >>> torch.allclose(squares, torch.ones(32))
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *args: Any,
        eps: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, eps=eps, **options)
        self.gain = nn.Parameter(self.weight.new_ones(self.out_channels, 1, 1, 1))

    def reset_parameters(self) -> None:
        """Draw weight and bias as :class:`torch.nn.Conv2d` does; the gain becomes one."""
        super().reset_parameters()
        if hasattr(self, "gain"):  # the constructor of Conv2d calls this, too
            nn.init.ones_(self.gain)

    def scale_of(self, variance: Tensor) -> Tensor:
        """Return the factor of centred filters, given their variance."""
        return self.gain * torch.rsqrt((variance * self.weight[0].numel()).clamp(min=self.eps))


def weight_norm_conv(*args: Any, **options: Any) -> nn.Conv2d:
    r"""Return a :class:`torch.nn.Conv2d` with PyTorch's Weight Normalization.

    The filter of each output channel is :math:`g_c V / \|V\|`, with the direction :math:`V` and the
    length :math:`g_c` as parameters. The first weights are those of
    :class:`torch.nn.Conv2d`: no initialisation depends on data.

    Source: T. Salimans and D. Kingma, "Weight Normalization", NeurIPS 2016;
    :func:`torch.nn.utils.parametrizations.weight_norm`.

    Args:
        args, options: see :class:`torch.nn.Conv2d`

    Example::

        >>> [name for name, _ in weight_norm_conv(3, 8, 3, bias=False).named_parameters()]
        ['parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    return cast(nn.Conv2d, weight_norm(nn.Conv2d(*args, **options)))
