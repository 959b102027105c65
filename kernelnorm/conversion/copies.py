"""Finds removed layers that have to copy their input, as the network changes it in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from kernelnorm.conversion.flow import Flow
from kernelnorm.conversion.kinds import Kind, kind_of
from kernelnorm.conversion.record import Call

__all__ = ["is_changed", "to_copy"]

_FORGETTING = (Kind.CONVOLUTION, Kind.SUM, Kind.CONCATENATION)
"""Calls that do not keep their output for the backward pass."""


def is_changed(flow: Flow, convolution: Call, removed: Collection[nn.Module]) -> bool:
    """True if a KNConv's output is changed in place, and no removed layer can make a copy of it."""
    (value, *_) = convolution.outputs
    others = [user for user in value.users if user.module not in removed]
    if len(others) < len(value.users):  # removed layers can copy; the other users cannot
        return any(value.storage in user.changed for user in others)
    return _changes(flow, {value.storage}, removed)


def to_copy(
    flow: Flow, removed: Collection[nn.Module], taken: Collection[nn.Module]
) -> Iterator[nn.Module]:
    """The removed layers that have to copy their input.

    An identity returns its input itself. If the input or the output is changed in place afterwards,
    others would see the change: another use of the input, the caller of the network, and a layer
    that made the input and keeps it for the backward pass, such as a KNConv with an activation.
    """
    for call in flow.calls:
        if call.module is None or call.module not in removed:
            continue
        value = call.inputs[0]
        maker = value.maker
        forgets = maker is not None and maker.module not in taken and kind_of(maker) in _FORGETTING
        shared = len(value.users) > 1 or not (forgets or (maker and maker.module in removed))
        if shared and _changes(flow, {value.storage, *_storages(call, removed)}, removed, call):
            yield call.module


def _storages(call: Call, removed: Collection[nn.Module]) -> set[int]:
    """The storages that become one storage if this and the following removed layers go."""
    found = {value.storage for value in call.outputs}
    for user in (user for value in call.outputs for user in value.users):
        if user.module in removed and user is not call:
            found |= _storages(user, removed)
    return found


def _changes(
    flow: Flow,
    storages: Collection[int],
    removed: Collection[nn.Module],
    after: Call | None = None,
) -> bool:
    """True if a call that is not removed changes one of the storages in place."""
    calls = flow.calls if after is None else flow.calls[flow.calls.index(after) + 1 :]
    return any(c.module not in removed and not c.changed.isdisjoint(storages) for c in calls)
