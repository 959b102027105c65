"""The calls of a network by layer, and the convolutions before and after each norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from kernelnorm.conversion import kinds
from kernelnorm.conversion.kinds import Kind, kind_of
from kernelnorm.conversion.record import Call, Value

__all__ = ["COMBINING", "Flow", "is_global_pooling"]

COMBINING = (Kind.SUM, Kind.CONCATENATION, Kind.POOLING, Kind.PRODUCT, Kind.PASSING)
"""Kinds of calls through which an output is followed to its uses."""


class Flow:
    """The calls of a network, in order, and by layer.

    Args:
        calls: the calls
        norms: names of the norms that are converted
    """

    def __init__(self, calls: Sequence[Call], norms: Collection[str]) -> None:
        self.calls = calls
        self.calls_of: defaultdict[nn.Module, list[Call]] = defaultdict(list)
        for call in calls:
            if call.module is not None:
                self.calls_of[call.module].append(call)
        named = [m for m in self.calls_of if kinds.name_of_norm(m) in norms]
        self.norms = [norm for norm in named if kinds.obstacle_of_norm(norm) is None]
        self.unknown_norms = [norm for norm in named if norm not in self.norms]
        self.before = {norm: self._before(norm) for norm in self.norms}
        """The convolutions whose output a norm normalises."""
        self.after = {norm: self._after(norm) for norm in self.norms}
        """The convolutions that take a norm's output."""

    @property
    def normalised_convolutions(self) -> set[nn.Module]:
        """The convolutions that a norm belongs to.

        A norm belongs to the convolutions before it. It also belongs to a convolution after it, as
        a pre-activation, in two cases: no convolution is before the norm, or the output of the
        convolution reaches a norm, perhaps through sums and concatenations.
        """
        found = {module for modules in self.before.values() for module in modules}
        for norm, modules in self.after.items():
            found.update(m for m in modules if not self.before[norm] or self._leads_to_norm(m))
        return found

    def _leads_to_norm(self, convolution: nn.Module) -> bool:
        waiting, seen = [*self.calls_of[convolution]], set[int]()
        while waiting:
            for user in (user for value in waiting.pop().outputs for user in value.users):
                if user.module in self.before:
                    return True
                if id(user) not in seen and kind_of(user) in COMBINING:
                    seen.add(id(user))
                    waiting.append(user)
        return False

    def _before(self, norm: nn.Module) -> list[nn.Module]:
        known: dict[Value, list[nn.Module]] = {}
        makers = [_makers(call.inputs[0], known) for call in self.calls_of[norm]]
        return _unique(makers) if all(makers) else []

    def _after(self, norm: nn.Module) -> list[nn.Module]:
        outputs = [value for call in self.calls_of[norm] for value in call.outputs]
        return _unique(_takers(value) for value in outputs)


def is_global_pooling(call: Call) -> bool:
    """True for a pooling whose output has one pixel, or no spatial dimension, in this call."""
    if kind_of(call) is not Kind.POOLING or not call.outputs:
        return False
    before, after = call.inputs[0].shape, call.outputs[0].shape
    return len(before) > 2 and all(size == 1 for size in after[2:])


def _makers(value: Value, known: dict[Value, list[nn.Module]]) -> list[nn.Module]:
    """The convolutions that a value comes from, perhaps pooled or concatenated.

    Args:
        known: the results for concatenated values, to which this adds
    """
    call = value.maker
    while call is not None and (
        kind_of(call) is Kind.PASSING
        or (kind_of(call) is Kind.POOLING and not is_global_pooling(call))
    ):
        value = call.inputs[0]
        call = value.maker
    if call is None:
        return []
    if kind_of(call) is Kind.CONVOLUTION and call.module is not None:
        return [call.module]
    if kind_of(call) is Kind.CONCATENATION:
        if value not in known:
            alone = all(len(part.users) == 1 for part in (value, *call.inputs))
            parts = [_makers(part, known) for part in call.inputs] if alone else []
            known[value] = _unique(parts) if all(parts) else []
        return known[value]
    return []


def _takers(value: Value) -> list[nn.Module]:
    """The convolutions that take a value, perhaps after an activation."""
    found: list[nn.Module] = []
    waiting = [*reversed(value.users)]
    while waiting:
        call = waiting.pop()
        kind = kind_of(call)
        if kind is Kind.CONVOLUTION and call.module is not None:
            found.append(call.module)
        elif kind is Kind.PASSING or kind in kinds.ACTIVATIONS:
            waiting += [
                user for output in reversed(call.outputs) for user in reversed(output.users)
            ]
    return found


def _unique(lists: Iterable[Iterable[nn.Module]]) -> list[nn.Module]:
    return [*dict.fromkeys(module for modules in lists for module in modules)]
