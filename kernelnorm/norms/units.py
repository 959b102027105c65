"""Norms with one mean and one variance for each position, tile or sliding window."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelnorm.arguments import integers
from kernelnorm.norms.affine import AffineNorm2d, check_group_size

__all__ = ["LocalContextNorm2d", "PositionalNorm2d", "SlidingLocalContextNorm2d"]


class _UnitNorm2d(AffineNorm2d):
    """Normalises by each unit's mean and variance. A subclass says what a unit is."""

    @abstractmethod
    def unit_mean(self, x: Tensor) -> Tensor:
        """Return each element's mean over its unit, in a shape that broadcasts to ``x``'s."""

    def normalise(self, x: Tensor) -> Tensor:
        """Subtract each unit's mean and divide by its deviation."""
        centred = x - self.unit_mean(x)
        variance = self.unit_mean(centred.square())
        return centred * torch.rsqrt(variance + self.eps)


class PositionalNorm2d(_UnitNorm2d):
    r"""Normalises each position over its channels.

    .. math::
        y_{ncij} = \frac{x_{ncij} - \mu_{nij}}{\sqrt{\sigma_{nij}^2 + \epsilon}} \gamma_c + \beta_c

    where :math:`\mu_{nij}` and :math:`\sigma_{nij}^2` are the mean and the biased variance of the
    :math:`c` elements at position :math:`(i, j)` of sample :math:`n`.

    Source: B. Li et al., "Positional Normalization", NeurIPS 2019; here without the moment
    shortcut, as in Section 2 of the KernelNorm paper.

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
        """Return the mean over the channels."""
        return x.mean(dim=1, keepdim=True)


class _LocalContextNorm2d(AffineNorm2d):
    """The base of both Local Context Norms: arguments, and means over groups of channels."""

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
        check_group_size(channels, group_size)
        self.group_size = group_size
        self.window = integers("window", window, 2, at_least=1)

    def group_mean(self, x: Tensor) -> Tensor:
        """Return the mean over the channels of each group, ``(n, groups, h, w)``."""
        groups: Tensor = x.unflatten(1, (-1, self.group_size))
        return groups.mean(dim=2)

    def spread(self, x: Tensor) -> Tensor:
        """Repeat the value of each group for each of its channels."""
        return x.repeat_interleave(self.group_size, dim=1)

    def extra_repr(self) -> str:
        """Return the arguments, as ``print`` shows them."""
        return f"{super().extra_repr()}, group_size={self.group_size}, window={self.window}"


class LocalContextNorm2d(_LocalContextNorm2d, _UnitNorm2d):
    r"""Normalises tiles of neighbouring positions and channels.

    The input is cut into tiles of ``group_size`` channels and ``window`` positions, from the upper
    left; each is normalised by its own mean :math:`\mu` and biased variance :math:`\sigma^2`, and
    each channel scaled and shifted:

    .. math::
        y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma_c + \beta_c

    If the window does not divide the map, the last tiles are smaller; their mean and variance are
    over the elements that they have. With a window larger than the map, the layer is a
    :class:`torch.nn.GroupNorm`.

    Source: A. Ortiz et al., "Local Context Normalization", CVPR 2020; here with tiles instead of a
    sliding window, as in Section 2 of the KernelNorm paper.

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

    def unit_mean(self, x: Tensor) -> Tensor:
        """Return the mean over each tile, at each of its elements."""
        height, width = x.shape[2:]
        rows, columns = min(self.window[0], height), min(self.window[1], width)
        # Not by ceil_mode: Inductor computes its backward pass wrongly for the smaller tiles.
        whole = F.pad(self.group_mean(x), (0, -width % columns, 0, -height % rows))
        positions = (
            (size - torch.arange(0, size, step, device=x.device)).clamp(max=step)
            for size, step in ((height, rows), (width, columns))
        )
        sums = F.avg_pool2d(whole, (rows, columns), divisor_override=1)
        tiles = sums / torch.outer(*positions).to(x.dtype)
        tiles = tiles.repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)
        return self.spread(tiles[..., :height, :width])


class SlidingLocalContextNorm2d(_LocalContextNorm2d):
    r"""Normalises each element by the window of positions and channels around it.

    .. math::
        y_{ncij} = \frac{x_{ncij} - \mu_{ngij}}{\sqrt{\sigma_{ngij}^2 + \epsilon}} \gamma_c
            + \beta_c

    :math:`\mu_{ngij}` and :math:`\sigma_{ngij}^2` are the mean and the biased variance of the
    ``group_size`` channels of the group :math:`g` that contains channel :math:`c`, in the
    ``window`` around position :math:`(i, j)`. Windows do not leave the map: near a border an
    element takes the statistics of the nearest window, and a window larger than the map is cut to
    its size.

    Source: A. Ortiz et al., "Local Context Normalization: Revisiting Local Normalization", CVPR
    2020. In the authors' code the statistics have no gradient, windows of odd sizes are not
    centred, and no window begins in the first row or column; here they follow the formula.

    Args:
        channels: the channels of the input
        group_size: the channels of a group, a divisor of ``channels``
        window: the rows and columns of a window, one number or two
        eps: added to the variance
        device, dtype: of the scale :math:`\gamma` (ones) and the shift :math:`\beta` (zeros)

    Shape:
        ``(n, channels, h, w)`` to the same.

    Raises:
        ValueError: if ``group_size`` does not divide ``channels``, an argument is not positive, or
            an input has another shape.

    Example::

        >>> x = torch.randn(1, 2, 9, 9)
        >>> y = SlidingLocalContextNorm2d(2, group_size=2, window=3)(x)
        >>> window = x[..., 3:6, 3:6]
        >>> expected = (x[..., 4, 4] - window.mean()) / window.std(correction=0)
        >>> torch.allclose(y[..., 4, 4], expected, atol=1e-4)
        True
    """

    def normalise(self, x: Tensor) -> Tensor:
        """Subtract the mean of the window around each element and divide by its deviation."""
        # A window's variance is the mean of the variances within pixels, plus the variance of the
        # pixels' means. The latter is a difference of squares: float64 keeps its digits.
        means = self.group_mean(x)
        within = self.group_mean((x - self.spread(means)).square())
        means = means.double()
        mean = self.window_mean(means)
        between = (self.window_mean(means.square()) - mean.square()).clamp(min=0)
        rstd = torch.rsqrt(self.window_mean(within) + between + self.eps)
        return (x - self.spread(mean.to(x.dtype))) * self.spread(rstd.to(x.dtype))

    def window_mean(self, x: Tensor) -> Tensor:
        """Return the mean over the window around each position."""
        height, width = x.shape[2:]
        rows, columns = min(self.window[0], height), min(self.window[1], width)
        means = F.avg_pool2d(x, (rows, columns), stride=1)
        above, left = (rows - 1) // 2, (columns - 1) // 2
        borders = (left, columns - 1 - left, above, rows - 1 - above)
        return F.pad(means, borders, mode="replicate")
