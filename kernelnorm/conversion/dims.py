"""The number of spatial dimensions of each new KernelNorm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kernelnorm.conversion import kinds
from kernelnorm.conversion.plan import Fate, Plan
from kernelnorm.conversion.record import Call

__all__ = ["spatial_dims"]


def spatial_dims(plan: Plan, calls: Sequence[Call]) -> dict[nn.Module, int]:
    """Return the number of spatial dimensions for each layer that becomes a KernelNorm.

    It follows from the name of the layer's class, from the shape of its input, or from the layers
    around it. A KernelNorm of one more dimension would take a batch of maps as one map, and mix the
    samples.

    Raises:
        ValueError: the number is not known
    """
    convolutions = (*kinds.CONVOLUTIONS, *kinds.TRANSPOSED)
    used = {_named(c.module) for c in calls if isinstance(c.module, convolutions)}
    everywhere = used.pop() if len(used) == 1 else None
    dims = dict[nn.Module, int]()
    for call in calls:
        module = call.module
        becomes_norm = plan.fates.get(module) is Fate.PIXELS if module is not None else False
        is_head = plan.head is not None and module is plan.head.module
        if module is None or not call.inputs or not (becomes_norm or is_head):
            continue
        shape = call.inputs[0].shape
        found = _named(module) or (len(shape) - 2 if shape else _around(call) or everywhere)
        if not found:
            raise ValueError(
                f"cannot tell the number of dimensions of the input of {call.name!r}, a "
                f"{type(module).__name__}: pass example_input"
            )
        dims[module] = found
    return dims


def _named(module: nn.Module | None) -> int | None:
    """The number of dimensions in the name of a layer's class, such as 1 for ``Conv1d``."""
    return next((d for d in (1, 2, 3) if f"{d}d" in type(module).__name__), None)


def _around(call: Call) -> int | None:
    """The number of dimensions of the nearest layer before or after a call whose name has it."""
    before = call.inputs[0].maker
    while before is not None and not _named(before.module):
        before = before.inputs[0].maker if before.inputs else None
    if before is not None:
        return _named(before.module)
    users = call.outputs[0].users
    while users and not _named(users[0].module):
        users = users[0].outputs[0].users if users[0].outputs else []
    return _named(users[0].module) if users else None
