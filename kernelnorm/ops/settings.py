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

    Without a mask (``masked=False``) the variance is the average over masks of probability ``p``:
    with ``p = 0`` it is the plain variance. ``slope`` is the slope of the activation for negative
    numbers: 0 for a ReLU, more for a LeakyReLU, ``None`` without an activation.
    """

    geometry: Geometry
    groups: int
    p: float
    masked: bool
    eps: float
    slope: float | None


class Constants(NamedTuple):
    r"""The factors of the statistics and of their gradients.

    A mask of zeros and ones is applied to the channels of each pixel. :math:`a` is the sum over a
    window of the pixels' means, and :math:`b` that of their mean squares:

    .. math::
        \mu = \text{mean} \cdot a \qquad V = \text{square} \cdot b - \mu^2 \qquad
        \text{var}(u') = V + \kappa (V + \mu^2)

    The gradient of each element :math:`x` that the mask keeps is
    :math:`\text{grad\_mean} \, d\mu + \text{grad\_var} \, x \, d\text{var}(u')`, where :math:`d\mu`
    includes the gradient through :math:`-\mu^2` in
    :math:`\text{var}(u') = (1 + \kappa) \, \text{square} \cdot b - \mu^2`.
    """

    mean: float
    square: float
    dropout_variance: float
    grad_mean: float
    grad_var: float


def constants(settings: Settings, channels: int) -> Constants:
    """The constants of a KNConv whose input has this number of channels."""
    if torch.compiler.is_compiling():  # compilers bypass caches
        return _constants(settings, channels)
    return _remembered_constants(settings, int(channels))  # a tracer's integers are tensors


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
