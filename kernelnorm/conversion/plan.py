"""Decides what each layer becomes, and why: rules I to IV of :mod:`kernelnorm.models.rules`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import nn

from kernelnorm.conversion import kinds
from kernelnorm.conversion.activations import Activations, plan_activations
from kernelnorm.conversion.flow import Flow
from kernelnorm.conversion.head import Head, plan_head
from kernelnorm.conversion.record import Call
from kernelnorm.models.rules import Rules

__all__ = ["Fate", "Plan", "make_plan"]

LEAST_WINDOW = 8
"""Convolutions with fewer elements in a window stay: the variance of so few is too noisy."""


class Fate(Enum):
    """What becomes of a convolution or a norm."""

    KN_CONV = "a KNConv"
    REMOVED = "nothing is left"
    PIXELS = "a KernelNorm with windows of one pixel"
    KEPT = "stays, as it should"
    UNCONVERTED = "cannot be converted, although it is a norm or has one"


@dataclass(frozen=True)
class Plan:
    """What becomes of the layers of a network.

    Args:
        fates: the fate of each convolution and norm
        activations: what becomes of the activations
        head: the KernelNorm before the final pooling
        why: the reason for each layer
    """

    fates: dict[nn.Module, Fate]
    activations: Activations
    head: Head | None
    why: dict[nn.Module, str]


def make_plan(calls: Sequence[Call], norms: Collection[str], rules: Rules) -> Plan:
    """Decide what becomes of each layer.

    Args:
        calls: the calls of all layers
        norms: the names of the norms that are converted
        rules: the rules for KNConvNets
    """
    flow = Flow(calls, norms)
    reasons: dict[nn.Module, tuple[Fate, str]] = {}
    normalised = flow.normalised_convolutions
    for module in flow.calls_of:
        if kinds.is_convolution(module):
            reasons[module] = _fate_of_convolution(module, has_norm=module in normalised)
    for norm in flow.norms:
        reasons[norm] = _fate_of_norm(norm, flow, reasons)
    for norm in flow.unknown_norms:
        reasons[norm] = Fate.UNCONVERTED, kinds.obstacle_of_norm(norm) or ""
    fates = {module: fate for module, (fate, _) in reasons.items()}
    why = {module: reason for module, (_, reason) in reasons.items()}

    head = plan_head(flow, rules) if rules.head else None
    activations = plan_activations(
        flow,
        {module for module, fate in fates.items() if fate is Fate.KN_CONV},
        {module for module, fate in fates.items() if fate is Fate.REMOVED},
        head,
        rules,
    )
    why.update(activations.why)
    if head is not None:
        fates.pop(head.module, None)
        why[head.module] = "rule IV: a KernelNorm before the final pooling"
    return Plan(fates, activations, head, why)


def _fate_of_convolution(module: nn.Module, has_norm: bool) -> tuple[Fate, str]:
    """Rule I: the convolutions with a norm before or after them become KNConvs."""
    if not has_norm:
        return Fate.KEPT, "no norm before or after it"
    if (obstacle := kinds.obstacle_of_convolution(module)) is not None:
        transposed = isinstance(module, kinds.TRANSPOSED)
        return Fate.KEPT if transposed else Fate.UNCONVERTED, obstacle
    assert isinstance(module, kinds.CONVOLUTIONS)
    if (size := kinds.window_size(module)) < LEAST_WINDOW:
        return Fate.KEPT, f"its windows have {size} elements"
    return Fate.KN_CONV, "rule I"


def _fate_of_norm(
    norm: nn.Module, flow: Flow, reasons: dict[nn.Module, tuple[Fate, str]]
) -> tuple[Fate, str]:
    """Rule II: norms of KNConvs are removed; others become KernelNorms of 1x1 windows."""
    neighbours = flow.before[norm] or flow.after[norm]
    others = [module for module in neighbours if reasons[module][0] is not Fate.KN_CONV]
    if neighbours and not others:
        return Fate.REMOVED, "rule II: the KNConv normalises its input"
    shapes = [call.inputs[0].shape for call in flow.calls_of[norm]]
    for shape in shapes:
        if len(shape) in (1, 2) or len(shape) > 5:
            return Fate.UNCONVERTED, f"no windows in an input of {len(shape)} dimensions"
    if not neighbours and not shapes[0] and "1d" in type(norm).__name__:  # of vectors, likely
        return Fate.UNCONVERTED, "no windows, unless its input is a sequence"
    if others:
        return Fate.PIXELS, f"its convolution stays: {reasons[others[0]][1]}"
    return Fate.PIXELS, "no convolution before or after it"
