"""The normalisation layers that KernelNorm is compared with, for 2-d feature maps, by name.

They differ in their *normalisation unit*, the elements that share one mean and one variance
(Section 2 of the paper). For an input of shape ``(n, c, h, w)``:

================== ====================================== ===========================
name               layer                                  unit
================== ====================================== ===========================
``batch``          :class:`torch.nn.BatchNorm2d`          ``(n, h, w)``
``group``          :class:`torch.nn.GroupNorm`            ``(group size, h, w)``
``layer``          :class:`torch.nn.GroupNorm`, 1 group   ``(c, h, w)``
``instance``       :class:`torch.nn.InstanceNorm2d`       ``(h, w)``
``positional``     :class:`PositionalNorm2d`              ``(c,)``
``local_context``  :class:`LocalContextNorm2d`            ``(group size, r, s)``
``none``           :class:`torch.nn.Identity`             none
``kernel``         a rule, see :mod:`.models.blocks`      ``(c, kh, kw)``, overlapping
================== ====================================== ===========================
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _UnitNorm2d(nn.Module, ABC):
    """Normalises by each unit's mean and variance, then scales and shifts each channel.

    Half-precision inputs are normalised in float32. A subclass says what a unit is.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the scale 1 and the shift 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    @abstractmethod
    def unit_mean(self, x: Tensor) -> Tensor:
        """Returns each element's mean over its unit, in a shape that broadcasts to ``x``'s."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` normalised, in its own dtype."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected an input (n, {self.channels}, h, w), got {tuple(x.shape)}")
        centred = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = centred - self.unit_mean(centred)
        variance = self.unit_mean(centred.square())
        y = centred * torch.rsqrt(variance + self.eps)
        return (y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)

    def extra_repr(self) -> str:
        """Returns the arguments, as ``print`` shows them."""
        return f"{self.channels}, eps={self.eps}"


class PositionalNorm2d(_UnitNorm2d):
    r"""Normalises each position over its channels.

    .. math::
        y_{ncij} = \frac{x_{ncij} - \mu_{nij}}{\sqrt{\sigma_{nij}^2 + \epsilon}} \gamma_c + \beta_c

    where :math:`\mu_{nij}` and :math:`\sigma_{nij}^2` are the mean and the biased variance of the
    :math:`c` elements at position :math:`(i, j)` of sample :math:`n`.

    Source: B. Li et al., "Positional Normalization", NeurIPS 2019; here as in Section 2 of the
    paper, without the moment shortcut.

    Args:
        channels: the channels of the input
        eps: added to the variance
        device, dtype: of the scale :math:`\gamma` (ones) and the shift :math:`\beta` (zeros)

    Shape:
        ``(n, channels, h, w)`` to the same.

    Raises:
        ValueError: if ``channels`` is not positive, or an input has another shape.

    Example::

        >>> y = PositionalNorm2d(64)(torch.randn(2, 64, 8, 8))
        >>> bool(y.mean(dim=1).abs().max() < 1e-5)
        True
    """

    def unit_mean(self, x: Tensor) -> Tensor:
        """Returns the mean over the channels."""
        return x.mean(dim=1, keepdim=True)


class LocalContextNorm2d(_UnitNorm2d):
    r"""Normalises tiles of neighbouring positions and channels.

    The input is cut into tiles of ``group_size`` channels and ``window`` positions, from the upper
    left; each is normalised by its own mean :math:`\mu` and biased variance :math:`\sigma^2`, and
    each channel scaled and shifted:

    .. math::
        y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma_c + \beta_c

    Where the window does not divide the map, the last tiles are smaller, and their mean and
    variance are those of the elements that they have. A window larger than the map makes the layer
    :class:`torch.nn.GroupNorm`.

    Source: A. Ortiz et al., "Local Context Normalization", CVPR 2020; here with the units that
    Section 2 of the paper gives, tiles instead of a window that slides.

    Args:
        channels: the channels of the input
        group_size: the channels of a tile, a divisor of ``channels``
        window: the rows and columns of a tile, one number or two
        eps: added to the variance
        device, dtype: of the scale :math:`\gamma` (ones) and the shift :math:`\beta` (zeros)

    Shape:
        ``(n, channels, h, w)`` to the same.

    Raises:
        ValueError: if ``group_size`` does not divide ``channels``, an argument is not positive, or
            an input has another shape.

    Example::

        >>> y = LocalContextNorm2d(64, group_size=32, window=4)(torch.randn(2, 64, 10, 10))
        >>> bool(y[0, :32, 8:, 8:].mean().abs() < 1e-5)  # a last tile, of 2 x 2 positions
        True
    """

    def __init__(
        self,
        channels: int,
        group_size: int,
        window: int | tuple[int, int],
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps, device, dtype)
        if group_size < 1 or channels % group_size:
            raise ValueError(f"group_size must divide channels = {channels}, got {group_size}")
        self.group_size = group_size
        self.window = (window, window) if isinstance(window, int) else tuple(window)
        if len(self.window) != 2 or min(self.window) < 1:
            raise ValueError(f"window must be one or two positive numbers, got {window}")

    def unit_mean(self, x: Tensor) -> Tensor:
        """Returns the mean over each tile, at each of its elements."""
        rows, columns = self.window
        n, channels, height, width = x.shape
        groups = x.reshape(n, channels // self.group_size, self.group_size, height, width)
        tiles = F.avg_pool2d(groups.mean(dim=2), self.window, ceil_mode=True)
        tiles = tiles.repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)
        return tiles[..., :height, :width].repeat_interleave(self.group_size, dim=1)

    def extra_repr(self) -> str:
        """Returns the arguments, as ``print`` shows them."""
        return f"{super().extra_repr()}, group_size={self.group_size}, window={self.window}"


def _group_size(channels: int) -> int:
    """Returns the paper's 32 where it divides ``channels``, else the largest divisor below it."""
    return max(size for size in range(1, 33) if channels % size == 0)


_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(channels // _group_size(channels), channels),
    "layer": partial(nn.GroupNorm, 1),
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "positional": PositionalNorm2d,
    "local_context": lambda channels: LocalContextNorm2d(channels, _group_size(channels), window=8),
    "none": lambda channels: nn.Identity(),
}

NORMS = (*_LAYERS, "kernel")
"""The names of the normalisations that the networks take as ``norm=``."""


def make_norm(name: str, channels: int) -> nn.Module:
    """Returns the normalisation layer ``name`` for feature maps of ``channels`` channels.

    - ``group`` and ``local_context`` take groups of 32 channels, as the paper does, and where 32
      does not divide ``channels`` the largest divisor below it.
    - ``local_context`` takes tiles of 8 x 8 positions.
    - ``instance`` has a scale and a shift, and no running statistics. It refuses maps of one
      position (PyTorch's "Expected more than 1 spatial element"), which it would make constant:
      give such a network larger images or another norm.

    Args:
        name: one of :data:`NORMS`, but not ``"kernel"``, which is no layer to put after a
            convolution but the rules in :mod:`kernelnorm.models.blocks`
        channels: the channels of the feature maps

    Raises:
        ValueError: if there is no such layer.

    Example::

        >>> make_norm("group", 64).num_groups
        2
    """
    if name == "kernel":
        raise ValueError(
            'norm "kernel" is not a layer that follows a convolution: it replaces the convolution '
            "by KNConv2d, see kernelnorm.models.blocks"
        )
    if name not in _LAYERS:
        raise ValueError(f"unknown norm {name!r}, choose one of: {', '.join(NORMS)}")
    return _LAYERS[name](channels)
