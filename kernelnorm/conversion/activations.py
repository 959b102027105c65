"""Rule III: which activations move into the KNConvs that make their input.

A ReLU moves to all of these, through sums, concatenations and pooling, or it stays. One module may
be called in several places: it moves if all of its calls can.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from kernelnorm.arguments import LEAST_SLOPE
from kernelnorm.conversion import kinds
from kernelnorm.conversion.flow import Flow
from kernelnorm.conversion.head import Head
from kernelnorm.conversion.kinds import Kind, kind_of
from kernelnorm.conversion.record import Call, Value
from kernelnorm.models.blocks import Rules

__all__ = ["Activations", "plan_activations"]


@dataclass(frozen=True)
class Activations:
    """What becomes of the activations.

    Args:
        taken: the activation that a KNConv takes over
        removed: activations that nothing is left of
        copied: norms that become a copy, since what follows changes the KNConv's output in place
        functions: the modules whose ``forward`` calls a ReLU as a function that could move
        why: the reason for each activation that has to do with a KNConv
    """

    taken: Mapping[nn.Module, nn.Module]
    removed: Collection[nn.Module]
    copied: Collection[nn.Module]
    functions: Collection[str]
    why: Mapping[nn.Module, str]


@dataclass
class _Origin:
    """Where the numbers come from that a call of an activation takes."""

    calls: list[Call] = field(default_factory=list)  # of KNConvs
    summed: bool = False
    gathered: bool = False
    obstacle: str = ""


def plan_activations(
    flow: Flow,
    convolutions: Collection[nn.Module],
    removed_norms: Collection[nn.Module],
    head: Head | None,
    rules: Rules,
) -> Activations:
    """Decides what becomes of the ReLUs and LeakyReLUs.

    Args:
        flow: the calls
        convolutions: those that become KNConvs
        removed_norms: norms that nothing is left of
        head: the KernelNorm before the final pooling
        rules: where residual networks have their ReLU
    """
    why: dict[nn.Module, str] = {}
    moving: dict[nn.Module, list[_Origin]] = {}
    for module, calls in flow.calls_of.items():
        kind = kinds.kind_of_module(module)
        if kind not in (Kind.RELU, Kind.LEAKY_RELU) or (head and module is head.module):
            continue
        origins = [
            _origin(call, convolutions, removed_norms, rules)
            for call in calls
            if head is None or call is not head.replaces
        ]
        obstacle = next((origin.obstacle for origin in origins if origin.obstacle), "")
        obstacle = obstacle or _obstacle_of_leaky_relu(module, origins)
        if not obstacle:
            moving[module] = origins
        elif any(origin.calls for origin in origins):
            why[module] = f"stays: {obstacle}"
    while lost := _cannot_move(flow, moving, removed_norms):
        for module, obstacle in lost.items():
            why[module] = f"stays: {obstacle}"
            del moving[module]

    functions = dict[str, None]()
    for call in flow.calls:
        if call.module is None and kind_of(call) is Kind.RELU:
            origin = _origin(call, convolutions, removed_norms, rules)
            if origin.calls and not origin.obstacle:
                functions[call.owner] = None

    taken: dict[nn.Module, nn.Module] = {}
    removed, copied = [], []
    for module, origins in moving.items():
        for call in _calls(origins):
            assert call.module is not None
            taken[call.module] = module
            copied += _norms_to_copy(flow, call, {*removed_norms, *moving}) or []
        if rules.residual_relu == "branch" or not any(origin.summed for origin in origins):
            removed.append(module)
            gathered = any(origin.gathered for origin in origins)
            why[module] = (
                f"rule III: moved into the {'KNConvs' if gathered else 'KNConv'} before it"
            )
    return Activations(taken, removed, copied, functions, why)


def _origin(
    activation: Call,
    convolutions: Collection[nn.Module],
    removed_norms: Collection[nn.Module],
    rules: Rules,
) -> _Origin:
    found, seen = _Origin(), set[int]()

    def walk(value: Value, has_other_use: bool = False) -> None:
        call = value.maker
        if call is None:
            found.obstacle = "its input is no output of a KNConv"
        if call is None or id(call) in seen:
            return
        seen.add(id(call))
        kind, has_other_use = kind_of(call), has_other_use or len(value.users) > 1
        if call.module in convolutions:
            found.calls.append(call)
            if has_other_use and not found.gathered:
                found.obstacle = "the output of the KNConv has another use, too"
        elif call.module in removed_norms or kind is Kind.PASSING:
            walk(call.inputs[0], has_other_use)
        elif kind in (Kind.SUM, Kind.CONCATENATION, Kind.POOLING):
            found.gathered = True
            found.summed |= kind is Kind.SUM
            for part in call.inputs:
                walk(part)
        elif kind is Kind.PRODUCT:  # with a gate
            for part in call.inputs:
                if part.shape == value.shape:
                    walk(part, has_other_use)
        elif kind not in (Kind.RELU, Kind.BOUNDED):  # whose output is not negative anyway
            found.obstacle = f"its input comes from {call.name or 'another function'}, too"

    walk(activation.inputs[0])
    if found.summed and rules.residual_relu == "sum" and not found.obstacle:
        found.obstacle = "rule residual_relu='sum'"
    return found


def _obstacle_of_leaky_relu(module: nn.Module, origins: list[_Origin]) -> str:
    if not isinstance(module, nn.LeakyReLU):
        return ""
    if not LEAST_SLOPE <= module.negative_slope <= 1:
        return f"KNConvs have no LeakyReLU of slope {module.negative_slope}"
    gathered = any(origin.gathered for origin in origins)
    return "a LeakyReLU of several outputs is another than theirs" if gathered else ""


def _cannot_move(
    flow: Flow,
    moving: Mapping[nn.Module, list[_Origin]],
    removed_norms: Collection[nn.Module],
) -> dict[nn.Module, str]:
    """The activations that a call of a convolution holds back, with the reason."""
    covered = {id(call) for origins in moving.values() for call in _calls(origins)}
    takers: defaultdict[nn.Module, set[nn.Module]] = defaultdict(set)
    for module, origins in moving.items():
        for call in _calls(origins):
            assert call.module is not None
            takers[call.module].add(module)
    absorbed, lost = {*removed_norms, *moving}, dict[nn.Module, str]()
    for convolution, modules in takers.items():
        calls, reason = flow.calls_of[convolution], ""
        if any(id(call) not in covered for call in calls):
            reason = "the KNConv is also called without it"
        elif len({_settings(module) for module in modules}) > 1:
            reason = "the KNConv has another activation, too"
        elif any(_norms_to_copy(flow, call, absorbed) is None for call in calls):
            reason = "what follows changes the output of the KNConv in place"
        lost.update(dict.fromkeys(modules, reason) if reason else {})
    return lost


def _norms_to_copy(
    flow: Flow, call: Call, absorbed: Collection[nn.Module]
) -> list[nn.Module] | None:
    """The norm after a KNConv with an activation whose output is changed in place.

    Returns:
        No norm if nothing changes the output; ``None`` if something does and there is no norm.
    """
    value, norms = call.outputs[0], []
    while len(value.users) == 1 and value.users[0].module in absorbed and value.users[0].outputs:
        user = value.users[0]
        norms += [user.module] if user.module in flow.norms and user.module is not None else []
        value = user.outputs[-1]
    changing = (c for c in flow.calls if value.storage in c.changed and c.module not in absorbed)
    return (norms or None) if any(changing) else []


def _calls(origins: list[_Origin]) -> list[Call]:
    return [call for origin in origins for call in origin.calls]


def _settings(activation: nn.Module) -> float:
    """The slope, which is all that ReLUs and LeakyReLUs differ in."""
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0
