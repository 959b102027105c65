"""Rule III: which activations move into the KNConvs that compute their input.

A ReLU moves to all KNConvs that compute its input, through sums, concatenations and pooling, or it
stays. It stays if that would change another use of their outputs: every path from such a KNConv
must lead to a ReLU that moves, to one that stays and takes the same elements, to a pooling that
computes a gate, or through a sum to a norm that is not removed. A module that is called in several
places moves if it can move from all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from kernelnorm.arguments import has_slope
from kernelnorm.conversion import kinds
from kernelnorm.conversion.copies import is_changed, to_copy
from kernelnorm.conversion.flow import Flow
from kernelnorm.conversion.head import Head
from kernelnorm.conversion.kinds import Kind, kind_of
from kernelnorm.conversion.record import Call
from kernelnorm.conversion.uses import gated, other_uses
from kernelnorm.models.rules import Rules

__all__ = ["Activations", "plan_activations"]

_GATHERING = (Kind.SUM, Kind.CONCATENATION, Kind.POOLING)
"""Calls whose input may be the output of several KNConvs."""


@dataclass(frozen=True)
class Activations:
    """What becomes of the activations.

    Args:
        taken: for each KNConv that takes over an activation, this activation
        removed: activations that are removed
        copied: norms and activations that become a :class:`~kernelnorm.conversion.layers.Copy`,
            since a later call changes their output in place
        functions: the names of modules whose ``forward`` calls a ReLU as a function, where an
            :class:`torch.nn.ReLU` could move
        why: the reason for each activation that has to do with a KNConv
    """

    taken: Mapping[nn.Module, nn.Module]
    removed: Collection[nn.Module]
    copied: Collection[nn.Module]
    functions: Collection[str]
    why: Mapping[nn.Module, str]


@dataclass
class _Origin:
    """The calls from which the input of an activation comes."""

    calls: list[Call] = field(default_factory=list)  # of KNConvs
    summed: bool = False
    gathered: bool = False
    normalized: bool = False  # by a norm that is removed
    obstacle: str = ""


def plan_activations(
    flow: Flow,
    convolutions: Collection[nn.Module],
    removed_norms: Collection[nn.Module],
    head: Head | None,
    rules: Rules,
) -> Activations:
    """Decide what becomes of the ReLUs and LeakyReLUs.

    Args:
        flow: the calls
        convolutions: those that become KNConvs
        removed_norms: norms that are removed
        head: the KernelNorm before the final pooling
        rules: where residual networks have their ReLU
    """
    why: dict[nn.Module, str] = {}
    moving: dict[nn.Module, list[_Origin]] = {}
    for module, calls in flow.calls_of.items():
        kind = kinds.kind_of_module(module)
        if kind not in (Kind.RELU, Kind.LEAKY_RELU) or (head and module is head.module):
            continue
        replaced = [call for call in calls if head is not None and call is head.replaces]
        origins = [
            _origin(call, convolutions, removed_norms, rules)
            for call in calls
            if call not in replaced
        ]
        obstacle = next((origin.obstacle for origin in origins if origin.obstacle), "")
        obstacle = obstacle or _obstacle_of_module(module, origins)
        if not replaced and not any(origin.calls or origin.normalized for origin in origins):
            continue  # it has nothing to do with KNConvs
        if obstacle:
            why[module] = f"stays: {obstacle}"
        else:
            moving[module] = origins
    while lost := _cannot_move(flow, moving, removed_norms, head):
        for module, obstacle in lost.items():
            why[module] = f"stays: {obstacle}"
            del moving[module]

    taken: dict[nn.Module, nn.Module] = {}
    removed: list[nn.Module] = []
    for module, origins in moving.items():
        taken.update((call.module, module) for call in _calls(origins) if call.module is not None)
        if rules.residual_relu == "branch" or not any(origin.summed for origin in origins):
            removed.append(module)
            several = any(origin.gathered for origin in origins)
            why[module] = (
                f"rule III: moved into the {'KNConvs' if several else 'KNConv'} before it"
                if any(_calls(origins))
                else "its input is not negative"
            )
    functions = dict[str, None]()
    for call in flow.calls:
        if call.module is None and kind_of(call) is Kind.RELU:
            origin = _origin(call, convolutions, removed_norms, rules)
            if origin.calls and not origin.obstacle:
                functions[call.owner] = None
    gone = {*removed_norms, *removed}
    return Activations(taken, removed, [*to_copy(flow, gone, taken)], functions, why)


def _origin(
    activation: Call,
    convolutions: Collection[nn.Module],
    removed_norms: Collection[nn.Module],
    rules: Rules,
) -> _Origin:
    found, seen, waiting = _Origin(), set[int](), [activation.inputs[0]]
    while waiting:
        value = waiting.pop()
        call = value.maker
        if call is None:
            found.obstacle = "its input is no output of a KNConv"
        if call is None or id(call) in seen:
            continue
        seen.add(id(call))
        kind = kind_of(call)
        if call.module in convolutions:
            found.calls.append(call)
        elif call.module in removed_norms or kind is Kind.PASSING:
            found.normalized |= call.module in removed_norms
            waiting.append(call.inputs[0])
        elif kind in _GATHERING and not kinds.pools_any_size_to_one_pixel(call):
            found.gathered = True
            found.summed |= kind is Kind.SUM
            if kind is Kind.SUM and (len(call.inputs) < 2 or call.options.get("alpha", 1) != 1):
                found.obstacle = "a number is added to its input, or multiplied"
            waiting += reversed(call.inputs)
        elif kind is Kind.PRODUCT and (factor := gated(call, value)) is not None:
            waiting.append(factor)
        elif kind not in (Kind.RELU, Kind.BOUNDED):  # whose output is not negative anyway
            found.obstacle = f"its input comes from {call.name or 'another function'}, too"
    if any(value.shape != activation.inputs[0].shape for value in activation.outputs):
        found.obstacle = "it changes a part of a tensor in place"
    if found.summed and rules.residual_relu == "sum" and not found.obstacle:
        found.obstacle = "rule residual_relu='sum'"
    return found


def _obstacle_of_module(module: nn.Module, origins: list[_Origin]) -> str:
    if "forward" in vars(module):
        return "it has a forward of its own"
    if not isinstance(module, nn.LeakyReLU):
        return ""
    if not has_slope(module.negative_slope):
        return f"KNConvs have no LeakyReLU of slope {module.negative_slope}"
    gathered = any(origin.gathered for origin in origins)
    return "a LeakyReLU moves only to one KNConv directly before it" if gathered else ""


def _cannot_move(
    flow: Flow,
    moving: Mapping[nn.Module, list[_Origin]],
    removed_norms: Collection[nn.Module],
    head: Head | None,
) -> dict[nn.Module, str]:
    """The activations that cannot move, since a KNConv has another use, with the reason."""
    covered = {id(call) for origins in moving.values() for call in _calls(origins)}
    takers: defaultdict[nn.Module, set[nn.Module]] = defaultdict(set)
    for module, origins in moving.items():
        for call in _calls(origins):
            assert call.module is not None
            takers[call.module].add(module)
    lost = dict[nn.Module, str]()
    for convolution, modules in takers.items():
        calls, reason = flow.calls_of[convolution], ""
        uses = [use for call in calls for use in other_uses(call, moving, removed_norms, head)]
        if any(id(call) not in covered for call in calls):
            reason = "the KNConv is also called without it"
        elif len({_slope(module) for module in modules}) > 1:
            reason = "the KNConv has another activation, too"
        elif uses:
            reason = f"the output of the KNConv has another use, too: {uses[0]}"
        elif any(is_changed(flow, call, {*removed_norms, *moving}) for call in calls):
            reason = "what follows changes the output of the KNConv in place"
        lost.update(dict.fromkeys(modules, reason) if reason else {})
    return lost


def _calls(origins: list[_Origin]) -> list[Call]:
    return [call for origin in origins for call in origin.calls]


def _slope(activation: nn.Module) -> float:
    """The slope for negative numbers, the only difference between ReLUs and LeakyReLUs."""
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0
