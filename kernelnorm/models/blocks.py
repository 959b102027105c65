"""The rules that make a network a KNConvNet, stated once (Section 3 of the paper).

(I)   Each convolution becomes a KNConv of the same kernel size, stride and padding, with dropout
      0.1 and a bias.
(II)  Batch normalisation goes.
(III) A ReLU follows each KNConv, except where a separate KernelNorm follows it.
(IV)  A KernelNorm of kernel size and stride 1, padding 0 and dropout 0.2, and a ReLU, stand before
      the final average pooling. (VGG8 does without.)

A network is wired once, for every norm: it asks :func:`layers_for` for its layers in the order
that the original network has them, and those that a norm has no use for are identities. By rule
III the ReLU is a part of the KNConv, so each branch of a residual block has its own and none
follows the addition, and the pre-activations of DenseNet become post-activations. The exception
is the last KNConv of ResNet and DenseNet: after the addition or the concatenation comes the
KernelNorm of rule IV. :class:`Rules` has what ablations vary.

The paper has no networks with depthwise convolutions, gates or other activations than the ReLU. In
those here, depthwise convolutions become KNConvs, too, the convolutions of gates stay, and other
activations follow their KNConv. ``docs/results/depthwise.md`` has the measurements behind this.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from kernelnorm.arguments import Evaluation
from kernelnorm.modules import KernelNorm2d, KNConv2d
from kernelnorm.norms import Norm, Scale, describe

Activation = Callable[[], nn.Module]
"""What makes the activation that follows a norm: a class such as ``nn.SiLU``."""

ResidualReLU = Literal["branch", "sum", "both"]
"""Where a residual block has its last ReLU; see :class:`Rules`."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What an ablation varies of the rules for KNConvNets; the defaults are the paper's.

    A rule that differs from its default but does nothing in a network is an error there.

    Args:
        dropout_p: rule I, the dropout of all KNConvs. Figure 5 compares 0 with a small value
        head_dropout_p: rule IV, the dropout of the KernelNorm before the final average pooling
        residual_relu: rule III in residual networks, which the paper states for each KNConv:

            - ``"branch"``, as stated: in the last KNConv of each branch and in the shortcut's, and
              none after the addition
            - ``"sum"``, as in the original networks: after the addition only
            - ``"both"``: in those KNConvs and after the addition. What those let through is not
              negative, so the second ReLU matters only in the last block, whose last KNConv has
              none by the rule's exception
        head: rule IV, whether there is a KernelNorm and a ReLU before the final average pooling.
            Without them no KernelNorm follows the last KNConv, which then has its ReLU
        evaluation: what all kernel layers do in evaluation, on which the paper is silent: see
            :class:`kernelnorm.KNConv2d`

    Raises:
        ValueError: a value is out of its range, or does nothing without a head:
            ``head_dropout_p``, and ``"both"``, which is ``"branch"`` then.

    Source: Section 3, rules I, III and IV; Figure 5.

    Example::

        >>> from kernelnorm.models import create_model
        >>> network = create_model("resnet18", rules=Rules(dropout_p=0.2, residual_relu="sum"))
        >>> network.conv1.dropout_p
        0.2
        >>> network = create_model("resnet18", rules={"head": False})
        >>> network.head
        Identity()
    """

    dropout_p: float = 0.1
    head_dropout_p: float = 0.2
    residual_relu: ResidualReLU = "branch"
    head: bool = True
    evaluation: Evaluation = "expected"

    def __post_init__(self) -> None:
        for name, p in (("dropout_p", self.dropout_p), ("head_dropout_p", self.head_dropout_p)):
            number = isinstance(p, (int, float)) and not isinstance(p, bool)
            if not number or not 0 <= p < 1:
                raise ValueError(f"rule {name} must be a number from 0 to below 1, got {p!r}")
        if self.residual_relu not in get_args(ResidualReLU):
            raise ValueError(
                f"rule residual_relu must be one of {get_args(ResidualReLU)}, "
                f"got {self.residual_relu!r}"
            )
        if not isinstance(self.head, bool):
            raise ValueError(f"rule head must be True or False, got {self.head!r}")
        if self.evaluation not in get_args(Evaluation):
            raise ValueError(
                f"rule evaluation must be one of {get_args(Evaluation)}, got {self.evaluation!r}"
            )
        if not self.head:
            _check_unused(self, {"head_dropout_p": "head=False leaves the KernelNorm out"})
            if self.residual_relu == "both":
                raise ValueError("rule residual_relu='both' is 'branch' with head=False: say that")


def _check_unused(rules: Rules, unused: Mapping[str, str]) -> None:
    """Refuse rules that differ from the paper's to no effect, each with the reason."""
    for name, reason in unused.items():
        value = getattr(rules, name)
        if value != getattr(Rules, name):
            raise ValueError(f"rule {name}={value!r} does nothing: {reason}. Leave it out")


@dataclass(frozen=True)
class NormLayers:
    """The layers of a network whose convolutions are followed (or preceded) by a norm.

    A norm with an activation of its own has it in :meth:`norm`, and no :meth:`relu` follows. Its
    residual blocks are pre-activated: norm and activation stand before each convolution, and
    neither after an addition.
    """

    spec: Norm
    fan_of_group: ClassVar[bool] = False
    """The argument of :func:`init_convolutions`."""

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
    """The argument of :func:`init_convolutions`: with the tiny depthwise weights of the other way
    of counting, training makes the features of all images alike."""

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
        _check_unused(given, unused or {})
        return KernelLayers(given)
    if rules is not None:
        raise ValueError(f"rules are for norm='kernel', got norm={norm!r}. Leave them out")
    return NormLayers(spec)


def as_rules(rules: Rules | Mapping[str, Any]) -> Rules:
    """Returns the rules, made from a mapping's fields if it is one."""
    if isinstance(rules, Rules):
        return rules
    names = [field.name for field in fields(Rules)]
    if not isinstance(rules, Mapping):
        raise ValueError(f"rules must be a mapping with any of {', '.join(names)}, got {rules!r}")
    for name in rules:
        if name not in names:
            raise ValueError(f"unknown rule {name!r}, choose from: {', '.join(names)}")
    return Rules(**rules)


def init_convolutions(
    network: nn.Module, mode: Literal["fan_in", "fan_out"], *, fan_of_group: bool = False
) -> None:
    """Draws the weights of all convolutions as He et al. (2015) do, and sets their biases to 0.

    Args:
        network: the module whose convolutions are initialised, in place
        mode: ``"fan_in"`` keeps the variance of the activations, ``"fan_out"`` of the gradients
        fan_of_group: of a convolution with groups, ``"fan_out"`` counts the connections inside a
            group. By default it counts those of all groups, as in PyTorch

    Example::

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> init_convolutions(network, "fan_in")
        >>> network[0].bias.tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            weight = module.weight
            nn.init.kaiming_normal_(weight, mode=mode, nonlinearity="relu")
            if fan_of_group and mode == "fan_out":
                with torch.no_grad():
                    weight.mul_(module.groups**0.5)
            if parametrize.is_parametrized(module, "weight"):
                module.weight = weight  # computed from others, which this sets
            if module.bias is not None:
                nn.init.zeros_(module.bias)
