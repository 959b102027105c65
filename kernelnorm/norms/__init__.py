"""KernelNorm and the normalisations that it is compared with, for 2-d feature maps, by name.

Most are layers that follow a convolution. They differ in their *normalisation unit*, the elements
that share one mean and one variance (Section 2 of the paper). For an input of shape
``(n, c, h, w)``:

========================= ========================================== ===========================
name                      layer                                      unit
========================= ========================================== ===========================
``batch``                 :class:`torch.nn.BatchNorm2d`              ``(n, h, w)``
``batch_renorm``          :class:`BatchRenorm2d`                     ``(n, h, w)``, and the past
``group``                 :class:`torch.nn.GroupNorm`                ``(group size, h, w)``
``layer``                 :class:`torch.nn.GroupNorm`, 1 group       ``(c, h, w)``
``instance``              :class:`torch.nn.InstanceNorm2d`           ``(h, w)``
``positional``            :class:`PositionalNorm2d`                  ``(c,)``
``local_context``         :class:`LocalContextNorm2d`                ``(group size, r, s)``
``local_context_sliding`` :class:`SlidingLocalContextNorm2d`         the same, overlapping
``lrn``                   :class:`torch.nn.LocalResponseNorm`        5 channels; no mean
``none``                  :class:`torch.nn.Identity`                 none
``kernel``                a rule, see :mod:`kernelnorm.models`       ``(c, kh, kw)``, overlapping
========================= ========================================== ===========================

Some have an activation of their own, which replaces the ReLU. Their authors use them in residual
networks with pre-activation blocks, and so do the networks here:

============== ============================== =====================
name           layer                          unit
============== ============================== =====================
``evonorm_s0`` :class:`EvoNorm2dS0`           ``(group size, h, w)``
``frn``        :class:`FilterResponseNorm2d`  ``(h, w)``; no mean
============== ============================== =====================

Some normalise the weights of the convolutions:

================= =================================== ==========================================
name              convolution                         what follows it
================= =================================== ==========================================
``ws_group``      :class:`WSConv2d`                   ``group``
``batch_channel`` :class:`WSConv2d`                   :class:`BatchChannelNorm2d`
``weight_norm``   :func:`weight_norm_conv`            nothing
``nf``            :class:`ScaledWSConv2d`             :class:`ScaledReLU`; in a residual network
                                                      :math:`h + \\alpha f(h / \\beta)`
================= =================================== ==========================================

:func:`describe` returns the :class:`Norm` of each name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from kernelnorm.arguments import check_counts
from kernelnorm.norms.activated import EvoNorm2dS0, FilterResponseNorm2d
from kernelnorm.norms.batch import BatchChannelNorm2d, BatchRenorm2d
from kernelnorm.norms.clipping import adaptive_clip_grad_, clipped_parameters
from kernelnorm.norms.signal import Scale, ScaledReLU
from kernelnorm.norms.units import (
    LocalContextNorm2d,
    PositionalNorm2d,
    SlidingLocalContextNorm2d,
)
from kernelnorm.norms.weights import ScaledWSConv2d, WSConv2d, weight_norm_conv

__all__ = [
    "NORMS",
    "BatchChannelNorm2d",
    "BatchRenorm2d",
    "EvoNorm2dS0",
    "FilterResponseNorm2d",
    "LocalContextNorm2d",
    "Norm",
    "PositionalNorm2d",
    "Scale",
    "ScaledReLU",
    "ScaledWSConv2d",
    "SlidingLocalContextNorm2d",
    "WSConv2d",
    "adaptive_clip_grad_",
    "clipped_parameters",
    "describe",
    "make_norm",
    "weight_norm_conv",
]

NormGroup = Literal["batch-dependent", "batch-independent", "weight-based"]
"""The source of a norm's statistics: several samples, one sample, or the weights."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation: its name in figures, its properties, and the layers that networks take.

    Args:
        label: its name for tables and figures
        group: the source of its statistics
        batch_one: whether it is meant for training with one image per batch
        needs: what training needs besides the optimizer: ``"agc"``, adaptive gradient clipping by
            :func:`adaptive_clip_grad_`
        layer: makes the layer that follows a convolution, from the number of channels; it includes
            the norm's own activation, if there is one
        conv: makes a convolution, from the arguments of :class:`torch.nn.Conv2d`
        bias: true for a norm without a shift: the convolutions then have a bias. Kernel networks
            have KNConvs with a bias in place of ``layer`` and ``conv``
        without_activation: makes ``layer`` without its activation. ``None``: the norm has no
            activation of its own
        alpha: the factor of the branches of residual blocks; the input of a branch is divided by
            its expected deviation, which follows from ``alpha``. ``None``: there are no factors
    """

    label: str
    group: NormGroup = "batch-independent"
    batch_one: bool = True
    needs: tuple[str, ...] = ()
    layer: Callable[[int], nn.Module]
    conv: Callable[..., nn.Conv2d] = nn.Conv2d
    bias: bool = False
    without_activation: Callable[[int], nn.Module] | None = None
    alpha: float | None = None

    @property
    def has_activation(self) -> bool:
        """Whether the norm has an activation of its own, in place of the network's."""
        return self.without_activation is not None


def _group_size(channels: int) -> int:
    """Return the paper's 32 where it divides ``channels``, else the largest divisor below it."""
    return max(size for size in range(1, 33) if channels % size == 0)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // _group_size(channels), channels)


def _local_context(
    cls: type[LocalContextNorm2d | SlidingLocalContextNorm2d], channels: int
) -> nn.Module:
    return cls(channels, _group_size(channels), window=8)


def _evonorm_s0(channels: int, activation: bool = True) -> nn.Module:
    return EvoNorm2dS0(channels, _group_size(channels), activation)


def _nothing(channels: int) -> nn.Module:
    return nn.Identity()


_NORMS: dict[str, Norm] = {
    "batch": Norm(
        label="BatchNorm", group="batch-dependent", batch_one=False, layer=nn.BatchNorm2d
    ),
    "group": Norm(label="GroupNorm", layer=_group_norm),
    "layer": Norm(label="LayerNorm", layer=partial(nn.GroupNorm, 1)),
    "instance": Norm(label="InstanceNorm", layer=partial(nn.InstanceNorm2d, affine=True)),
    "positional": Norm(label="PositionalNorm", layer=PositionalNorm2d),
    "local_context": Norm(
        label="LocalContextNorm", layer=partial(_local_context, LocalContextNorm2d)
    ),
    "local_context_sliding": Norm(
        label="LCN, sliding", layer=partial(_local_context, SlidingLocalContextNorm2d)
    ),
    "batch_renorm": Norm(
        label="BatchRenorm", group="batch-dependent", batch_one=False, layer=BatchRenorm2d
    ),
    "batch_channel": Norm(
        label="WS + BCN",
        group="batch-dependent",
        layer=lambda channels: BatchChannelNorm2d(channels, _group_size(channels)),
        conv=WSConv2d,
    ),
    "evonorm_s0": Norm(
        label="EvoNorm-S0",
        layer=_evonorm_s0,
        without_activation=partial(_evonorm_s0, activation=False),
    ),
    "frn": Norm(
        label="FRN + TLU",
        layer=FilterResponseNorm2d,
        without_activation=partial(FilterResponseNorm2d, activation=False),
    ),
    "lrn": Norm(
        label="LocalResponse", layer=lambda channels: nn.LocalResponseNorm(size=5), bias=True
    ),
    "ws_group": Norm(
        label="WS + GroupNorm", group="weight-based", layer=_group_norm, conv=WSConv2d
    ),
    "weight_norm": Norm(
        label="WeightNorm",
        group="weight-based",
        layer=_nothing,
        conv=weight_norm_conv,
        bias=True,
    ),
    "nf": Norm(
        label="normalizer-free",
        group="weight-based",
        needs=("agc",),
        layer=lambda channels: ScaledReLU(),
        conv=ScaledWSConv2d,
        bias=True,
        without_activation=_nothing,
        alpha=0.2,
    ),
    "none": Norm(label="no normalisation", layer=_nothing, bias=True),
    "kernel": Norm(label="KernelNorm", layer=_nothing),
}

NORMS = tuple(_NORMS)
"""The names of the normalisations that the networks take as ``norm=``."""


def describe(name: str) -> Norm:
    """Return the label, the properties and the layers of a normalisation.

    Args:
        name: one of :data:`NORMS`

    Raises:
        ValueError: if there is no such normalisation.

    Example::

        >>> describe("nf").group, describe("nf").needs
        ('weight-based', ('agc',))
    """
    if name not in _NORMS:
        raise ValueError(f"unknown norm {name!r}, choose one of: {', '.join(NORMS)}")
    return _NORMS[name]


def make_norm(name: str, channels: int) -> nn.Module:
    """Return the normalisation layer ``name`` for feature maps of ``channels`` channels.

    - ``group``, ``local_context``, ``local_context_sliding`` and ``evonorm_s0`` take groups of 32
      channels, as the paper does. If 32 does not divide ``channels``, the group size is the
      largest divisor below 32.
    - ``local_context`` takes tiles, and ``local_context_sliding`` windows, of 8 x 8 positions.
    - ``instance`` has a scale and a shift, and no running statistics. It refuses maps of one
      position (PyTorch's "Expected more than 1 spatial element"), which it would make constant:
      give such a network larger images or another norm.
    - ``lrn`` has PyTorch's defaults, over 5 channels. It hardly changes activations of the size
      that is usual in trained networks.
    - ``evonorm_s0`` and ``frn`` are norm and activation in one.

    Args:
        name: one of :data:`NORMS` except ``kernel``, ``ws_group``, ``batch_channel``,
            ``weight_norm`` and ``nf``, which replace the convolution
        channels: the channels of the feature maps

    Raises:
        ValueError: if there is no such layer, or ``channels`` is no positive integer.

    Example::

        >>> make_norm("group", 64).num_groups
        2
    """
    norm = describe(name)
    check_counts(channels=channels)
    if name == "kernel" or norm.conv is not nn.Conv2d:
        made_of = "KNConv2d" if name == "kernel" else f"kernelnorm.norms.{norm.conv.__name__}"
        raise ValueError(
            f'norm "{name}" is not a layer that follows a convolution: it replaces the convolution '
            f"by {made_of}. kernelnorm.models.create_model builds networks with it"
        )
    return norm.layer(channels)
