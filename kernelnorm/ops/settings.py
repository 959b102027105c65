"""The options of a KNConv, and the constants of its statistics that follow from them."""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

import torch

from kernelnorm.ops.mask import dropout_variance, rounded_p
from kernelnorm.ops.windows import Geometry


class Settings(NamedTuple):
    """The options of a KNConv.

    Without a mask (``masked=False``) the statistics are those that masks with probability ``p``
    give on average, which are the plain ones for ``p = 0``. ``slope`` is that of the activation for
    negative numbers: 0 for a ReLU, more for a LeakyReLU, ``None`` without one.
    """

    geometry: Geometry
    groups: int
    p: float
    masked: bool
    eps: float
    slope: float | None


class Constants(NamedTuple):
    r"""The factors of the statistics and of their gradients.

    With :math:`a` and :math:`b` the sums over a window of the mean and of the mean square of each
    pixel's channels after the mask of zeros and ones:

    .. math::
        \mu = \text{mean} \cdot a \qquad V = \text{square} \cdot b - \mu^2 \qquad
        \text{var}(u') = V + \kappa (V + \mu^2)

    The gradient of each unmasked element :math:`x` is
    :math:`\text{grad\_mean} \, d\mu + \text{grad\_var} \, x \, d\text{var}(u')`.
    """

    mean: float
    square: float
    dropout_variance: float
    grad_mean: float
    grad_var: float


def constants(settings: Settings, channels: int) -> Constants:
    """The constants of a KNConv on an input with that many channels."""
    if torch.compiler.is_compiling():  # compilers see no caches
        return _constants(settings, channels)
    return _remembered_constants(settings, int(channels))  # tracers have symbols for integers


def _constants(settings: Settings, channels: int) -> Constants:
    pixels = prod(settings.geometry.kernel_size)
    n = max(channels * pixels, 1)
    kept, kappa = 1.0, dropout_variance(settings.p, n)
    if settings.masked:
        kept, kappa = 1 - rounded_p(settings.p), 0.0
    return Constants(
        mean=1 / (kept * pixels),
        square=1 / (kept**2 * pixels),
        dropout_variance=kappa,
        grad_mean=1 / (kept * n),
        grad_var=2 * (1 + kappa) / (kept**2 * n),
    )


_remembered_constants = functools.lru_cache(maxsize=4096)(_constants)
