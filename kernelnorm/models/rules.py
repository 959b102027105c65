"""The rules that make a network a KNConvNet, stated once (Section 3 of the paper).

(I)   Each convolution becomes a KNConv of the same kernel size, stride and padding, with dropout
      0.1 and a bias.
(II)  Batch normalisation is removed.
(III) A ReLU follows each KNConv, except where a separate KernelNorm follows it.
(IV)  A KernelNorm of kernel size and stride 1, padding 0 and dropout 0.2, and a ReLU, come before
      the final average pooling, except in VGG8.

By rule III the ReLU is a part of the KNConv, so each branch of a residual block has its own and
none follows the addition, and the pre-activations of DenseNet become post-activations. The
exception is the last KNConv of ResNet and DenseNet: after the addition or the concatenation comes
the KernelNorm of rule IV. :class:`Rules` has the options of ablations.

The paper has no networks with depthwise convolutions, gates or other activations than the ReLU. In
the networks here that have them, depthwise convolutions become KNConvs, too, the convolutions of
gates stay, and other activations follow their KNConv. ``docs/results/depthwise.md`` has the
measurements behind this.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from kernelnorm.arguments import Evaluation

ResidualReLU = Literal["branch", "sum", "both"]
"""Where a residual block has its last ReLU; see :class:`Rules`."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The options of the rules for KNConvNets, for ablations; the defaults are the paper's.

    A rule that differs from its default but does nothing in a network is an error there.

    Args:
        dropout_p: rule I, the dropout of all KNConvs. Figure 5 compares 0 with a small value
        head_dropout_p: rule IV, the dropout of the KernelNorm before the final average pooling
        residual_relu: rule III in residual networks, which the paper states for each KNConv:

            - ``"branch"``, as stated: in the last KNConv of each branch and in the KNConv of the
              shortcut, and none after the addition
            - ``"sum"``, as in the original networks: after the addition only
            - ``"both"``: in those KNConvs and after the addition. The outputs of those KNConvs are
              not negative, so the second ReLU matters only in the last block, whose last KNConv has
              no ReLU by the exception to rule III
        head: rule IV, whether there is a KernelNorm and a ReLU before the final average pooling.
            Without them no KernelNorm follows the last KNConv, which then has its ReLU
        evaluation: the ``evaluation`` of all kernel layers, which the paper does not state: see
            :class:`kernelnorm.KNConv2d`

    Raises:
        ValueError: a value is out of its range, or ``head=False`` comes with ``head_dropout_p`` or
            with ``"both"``, which would then be the same as ``"branch"``.

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
            check_unused(self, {"head_dropout_p": "head=False leaves the KernelNorm out"})
            if self.residual_relu == "both":
                raise ValueError("rule residual_relu='both' needs head=True: else use 'branch'")


def check_unused(rules: Rules, unused: Mapping[str, str]) -> None:
    """Raise ``ValueError``, with the reason, for a rule in ``unused`` that is not its default."""
    for name, reason in unused.items():
        value = getattr(rules, name)
        if value != getattr(Rules, name):
            raise ValueError(f"rule {name}={value!r} does nothing: {reason}. Leave it out")


def as_rules(rules: Rules | Mapping[str, Any]) -> Rules:
    """Return the rules, made from a mapping's fields if it is one."""
    if isinstance(rules, Rules):
        return rules
    names = [field.name for field in fields(Rules)]
    if not isinstance(rules, Mapping):
        raise ValueError(f"rules must be a mapping with any of {', '.join(names)}, got {rules!r}")
    for name in rules:
        if name not in names:
            raise ValueError(f"unknown rule {name!r}, choose from: {', '.join(names)}")
    return Rules(**rules)
