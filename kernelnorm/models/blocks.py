"""The building blocks of networks: the layers of each norm, and those of a KNConvNet.

A network is defined once for all norms: it gets its layers from :func:`layers_for`, in the order of
the original network, and layers that a norm does not need are identities.
:mod:`kernelnorm.models.rules` states the rules of KNConvNets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from kernelnorm.models.rules import Rules, as_rules, check_unused
from kernelnorm.modules import KernelNorm2d, KNConv2d
from kernelnorm.norms import Norm, Scale, describe

Activation = Callable[[], nn.Module]
"""Makes the activation that follows a norm: a class such as ``nn.SiLU``."""


@dataclass(frozen=True)
class NormLayers:
    """The layers of a network whose convolutions are followed (or preceded) by a norm.

    For a norm with an activation of its own, :meth:`norm` includes the activation and :meth:`relu`
    is an identity. Its residual blocks are pre-activated: norm and activation come before each
    convolution, and neither comes after an addition.
    """

    spec: Norm
    fan_of_group: ClassVar[bool] = False
    """The argument of :func:`~kernelnorm.models.init_convolutions`."""

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        before_sum: bool = False,
        before_head: bool = False,
    ) -> nn.Conv2d:
        """Return a convolution.

        ``before_sum`` says that it is the last before an addition, ``before_head`` that it is the
        last before :meth:`head`.
        """
        return self.spec.conv(
            in_channels, out_channels, kernel_size, stride, padding, bias=self.spec.bias
        )

    def norm(self, channels: int, *, in_stream: bool = False) -> nn.Module:
        """Return the norm of a convolution's input or output.

        ``in_stream`` says that the result goes to an addition or into the first residual block. In
        pre-activated networks there is no norm at these places.
        """
        pre_activated = in_stream and self.spec.has_activation
        return nn.Identity() if pre_activated else self.spec.layer(channels)

    def conv_norm_activation(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: Activation | None = None,
        before_head: bool = False,
    ) -> nn.Sequential:
        """Return a convolution, its norm and, where there is one, the activation.

        The padding is half the kernel size. ``groups`` is 1, or ``in_channels`` in a depthwise
        convolution; ``before_head`` is that of :meth:`conv`. A norm's own activation replaces
        ``activation``.
        """
        conv = self.spec.conv(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=groups,
            bias=self.spec.bias,
        )
        if activation is None and self.spec.without_activation is not None:
            return nn.Sequential(conv, self.spec.without_activation(out_channels))
        after = None if self.spec.has_activation else activation
        return nn.Sequential(conv, self.spec.layer(out_channels), *_activations(after))

    def relu(self) -> nn.Module:
        """Return the activation that follows a norm."""
        return nn.Identity() if self.spec.has_activation else nn.ReLU()

    def preact(self, channels: int, additions: int) -> nn.Module:
        """Return the norm, activation and scale before a residual block, or after the last block.

        ``additions`` is the number of additions since the stem or the last shortcut that is a
        convolution. The result is an identity if the norm has no activation of its own.
        """
        if not self.spec.has_activation:
            return nn.Identity()
        layer = self.spec.layer(channels)
        if self.spec.alpha is None or additions == 0:
            return layer
        return nn.Sequential(layer, Scale((1 + additions * self.spec.alpha**2) ** -0.5))

    def branch_scale(self) -> nn.Module:
        """Return the factor of a residual block's branch."""
        return nn.Identity() if self.spec.alpha is None else Scale(self.spec.alpha)

    def sum_relu(self) -> nn.Module:
        """Return the activation that follows an addition."""
        return self.relu()

    def head(self, activation: Activation = nn.ReLU) -> nn.Module:
        """Return an identity: these norms add no layer before the final average pooling."""
        return nn.Identity()


@dataclass(frozen=True)
class KernelLayers:
    """The layers of a KNConvNet: the methods of :class:`NormLayers` under rules I to IV."""

    rules: Rules
    fan_of_group: ClassVar[bool] = True
    """The argument of :func:`~kernelnorm.models.init_convolutions`. ``False`` makes depthwise
    weights so small that, in training, the features of all images become the same."""

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        before_sum: bool = False,
        before_head: bool = False,
    ) -> nn.Conv2d:
        """Rule I, with the ReLU of rule III unless that follows the addition or the KernelNorm."""
        left_to_sum = before_sum and self.rules.residual_relu == "sum"
        followed_by_norm = before_head and self.rules.head
        return KNConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            bias=True,
            dropout_p=self.rules.dropout_p,
            activation=None if left_to_sum or followed_by_norm else "relu",
            evaluation=self.rules.evaluation,
        )

    def norm(self, channels: int, *, in_stream: bool = False) -> nn.Module:
        """Rule II: an identity in place of the norm."""
        return nn.Identity()

    def conv_norm_activation(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: Activation | None = None,
        before_head: bool = False,
    ) -> nn.Sequential:
        """Rules I to III. A ReLU is a part of the KNConv, another activation follows it.

        The windows of a depthwise KNConv have all channels, as in any KNConv.
        """
        if before_head and self.rules.head:
            activation = nn.Identity
        fused = activation is nn.ReLU
        conv = KNConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=groups,
            dropout_p=self.rules.dropout_p,
            activation="relu" if fused else None,
            evaluation=self.rules.evaluation,
        )
        after = nn.Identity if fused else activation
        return nn.Sequential(conv, self.norm(out_channels), *_activations(after))

    def relu(self) -> nn.Module:
        """Rule III: an identity, since the ReLU is part of the KNConv."""
        return nn.Identity()

    def preact(self, channels: int, additions: int) -> nn.Module:
        """Return an identity: blocks begin with a KNConv."""
        return nn.Identity()

    def branch_scale(self) -> nn.Module:
        """Return an identity: branches have no factor."""
        return nn.Identity()

    def sum_relu(self) -> nn.Module:
        """Rule III: an identity, unless :attr:`rules` put a ReLU after the addition."""
        return nn.Identity() if self.rules.residual_relu == "branch" else nn.ReLU()

    def head(self, activation: Activation = nn.ReLU) -> nn.Module:
        """Rule IV: the KernelNorm and the activation before the final average pooling."""
        if not self.rules.head:
            return nn.Identity()
        p, evaluation = self.rules.head_dropout_p, self.rules.evaluation
        return nn.Sequential(KernelNorm2d(1, 1, dropout_p=p, evaluation=evaluation), activation())


def _activations(activation: Activation | None) -> list[nn.Module]:
    return [] if activation is None else [activation()]


Layers = NormLayers | KernelLayers

FAMILIES = {"nf": ("vgg", "resnet")}
"""The families of networks that have a norm, for each norm that only some families have."""


def has_norm(network: str, norm: str) -> bool:
    """Tell whether a network of that name or family exists with a norm.

    A normalizer-free network needs the variance of the signal after each layer. Its authors derive
    it for residual networks, but not for concatenations, and they report that standardised weights
    harm depthwise convolutions.

    Example::

        >>> has_norm("resnet18", "nf"), has_norm("densenet121", "nf")
        (True, False)
    """
    return network.startswith(FAMILIES.get(norm, ""))


def layers_for(
    norm: str,
    rules: Rules | Mapping[str, Any] | None = None,
    *,
    family: str = "",
    unused: Mapping[str, str] | None = None,
) -> Layers:
    """Return the layers of a network.

    Args:
        norm: one of ``kernelnorm.norms.NORMS``
        rules: for the kernel norm, other rules than the paper's; a mapping has fields of
            :class:`Rules`, as YAML gives them
        family: the start of the network's name
        unused: the fields of :class:`Rules` that do nothing in this network, each with the reason

    Raises:
        ValueError: the rules have an unknown field, a value out of its range, or a value that does
            nothing in this network; there are rules but the norm is not ``"kernel"``; or the
            network does not exist with the norm.
    """
    spec = describe(norm)
    if not has_norm(family, norm):
        raise ValueError(
            f"norm={norm!r} exists for {' and '.join(FAMILIES[norm])} networks only, not for "
            f"{family or 'others'}: its authors publish none. Choose another norm"
        )
    if norm == "kernel":
        given = as_rules({} if rules is None else rules)
        check_unused(given, unused or {})
        return KernelLayers(given)
    if rules is not None:
        raise ValueError(f"rules are for norm='kernel', got norm={norm!r}. Leave them out")
    return NormLayers(spec)
