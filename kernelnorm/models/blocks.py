"""The building blocks of networks: the layers of each norm, and those of a KNConvNet.

A network is wired once, for every norm: it asks :func:`layers_for` for its layers in the order
that the original network has them, and those that a norm has no use for are identities.
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
"""What makes the activation that follows a norm: a class such as ``nn.SiLU``."""


@dataclass(frozen=True)
class NormLayers:
    """The layers of a network whose convolutions are followed (or preceded) by a norm.

    A norm with an activation of its own has it in :meth:`norm`, and no :meth:`relu` follows. Its
    residual blocks are pre-activated: norm and activation stand before each convolution, and
    neither after an addition.
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
        """Returns a convolution.

        ``before_sum`` says that it is the last before an addition, ``before_head`` that it is the
        last before :meth:`head`.
        """
        return self.spec.conv(
            in_channels, out_channels, kernel_size, stride, padding, bias=self.spec.bias
        )

    def norm(self, channels: int, *, in_stream: bool = False) -> nn.Module:
        """Returns the norm of a convolution's input or output.

        ``in_stream`` says that the result goes to an addition or to a residual block, without or
        before its activation: pre-activated blocks leave that as it is.
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
        """Returns a convolution, its norm and, where there is one, the activation.

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
        """Returns the activation that follows a norm."""
        return nn.Identity() if self.spec.has_activation else nn.ReLU()

    def preact(self, channels: int, additions: int) -> nn.Module:
        """Returns what a residual block, or what follows the last, begins with.

        ``additions`` says how many there were since the stem or the last shortcut that is a
        convolution.
        """
        if not self.spec.has_activation:
            return nn.Identity()
        layer = self.spec.layer(channels)
        if self.spec.alpha is None or additions == 0:
            return layer
        return nn.Sequential(layer, Scale((1 + additions * self.spec.alpha**2) ** -0.5))

    def branch_scale(self) -> nn.Module:
        """Returns the factor of a residual block's branch."""
        return nn.Identity() if self.spec.alpha is None else Scale(self.spec.alpha)

    def sum_relu(self) -> nn.Module:
        """Returns the activation that follows an addition."""
        return self.relu()

    def head(self, activation: Activation = nn.ReLU) -> nn.Module:
        """Returns what is added before the final average pooling, with that activation."""
        return nn.Identity()


@dataclass(frozen=True)
class KernelLayers:
    """The layers of a KNConvNet: the methods of :class:`NormLayers` under rules I to IV."""

    rules: Rules
    fan_of_group: ClassVar[bool] = True
    """The argument of :func:`~kernelnorm.models.init_convolutions`. ``False`` makes depthwise
    weights so small that training makes the features of all images alike."""

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
        """Rule I, with the ReLU of rule III unless it is the sum's or a KernelNorm comes next."""
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
        """Rule II."""
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

        The windows of a depthwise KNConv have all channels, as those of any KNConv.
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
        """Rule III: the convolution has it."""
        return nn.Identity()

    def preact(self, channels: int, additions: int) -> nn.Module:
        """Returns nothing that changes its input: blocks begin with a KNConv."""
        return nn.Identity()

    def branch_scale(self) -> nn.Module:
        """Returns nothing that changes its input: branches have no factor."""
        return nn.Identity()

    def sum_relu(self) -> nn.Module:
        """Rule III: the convolutions have it, unless :attr:`rules` vary that."""
        return nn.Identity() if self.rules.residual_relu == "branch" else nn.ReLU()

    def head(self, activation: Activation = nn.ReLU) -> nn.Module:
        """Rule IV."""
        if not self.rules.head:
            return nn.Identity()
        p, evaluation = self.rules.head_dropout_p, self.rules.evaluation
        return nn.Sequential(KernelNorm2d(1, 1, dropout_p=p, evaluation=evaluation), activation())


def _activations(activation: Activation | None) -> list[nn.Module]:
    return [] if activation is None else [activation()]


Layers = NormLayers | KernelLayers

FAMILIES = {"nf": ("vgg", "resnet")}
"""The only families of networks that have a norm, by its name."""


def has_norm(network: str, norm: str) -> bool:
    """Tells whether a network of that name or family exists with a norm.

    A normalizer-free network follows the variance from layer to layer. Its authors do so for
    residual networks; they publish no signal for concatenations, and report that depthwise
    convolutions suffer from standardised weights.

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
    """Returns the layers of a network.

    Args:
        norm: one of ``kernelnorm.norms.NORMS``
        rules: for the kernel norm, other rules than the paper's; a mapping has fields of
            :class:`Rules`, as YAML gives them
        family: the start of the network's name
        unused: the fields of :class:`Rules` that do nothing in this network, each with the reason

    Raises:
        ValueError: the rules have an unknown field, a value out of its range, or one that does
            nothing, or the norm is not ``"kernel"``; or the network does not have the norm.
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
