"""The uses of a KNConv's output that would see a ReLU on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from kernelnorm.conversion import kinds
from kernelnorm.conversion.flow import COMBINING, is_global_pooling
from kernelnorm.conversion.head import Head
from kernelnorm.conversion.kinds import Kind, kind_of
from kernelnorm.conversion.record import Call, Value

__all__ = ["gated", "other_uses"]


def other_uses(
    convolution: Call,
    moving: Collection[nn.Module],
    removed_norms: Collection[nn.Module],
    head: Head | None,
) -> Iterator[str]:
    """The names of calls that would get other numbers if the KNConv applied its activation."""
    # Besides each call: whether a sum is on the path, and whether the path only selects elements.
    waiting: list[tuple[Call, bool, bool]] = [(convolution, False, True)]
    seen = set[tuple[int, bool, bool]]()
    while waiting:
        call, summed, selects = waiting.pop()
        for value, user in ((v, user) for v in call.outputs for user in v.users):
            kind = kind_of(user)
            state = id(user), summed, selects
            if user.module in moving or (kind is Kind.RELU and selects) or state in seen:
                continue
            seen.add(state)
            if head and (user.module is head.module or user is head.replaces):
                continue
            if kind is Kind.POOLING and is_global_pooling(user) and _is_gate(user):
                continue
            if kind is Kind.NORM and user.module not in removed_norms and summed:
                continue
            if user.module in removed_norms or kind in COMBINING:
                same = user.module in removed_norms or _commutes_with_relu(user, value)
                waiting.append((user, summed or kind is Kind.SUM, selects and same))
            else:
                yield "what the model returns" if user.end else user.name or "a function"


def _commutes_with_relu(call: Call, value: Value) -> bool:
    """True if a ReLU before a combining call gives the same as a ReLU after it, for ``value``."""
    kind = kind_of(call)
    if kind is Kind.POOLING:
        return kinds.selects_elements(call)
    if kind is Kind.PRODUCT:
        return any(gated(call, output) is value for output in call.outputs)
    return kind is not Kind.SUM


def _is_gate(pooling: Call) -> bool:
    """True if the output of a global pooling is only used as a factor of products."""
    waiting, seen = [pooling], {id(pooling)}
    while waiting:
        users = [user for value in waiting.pop().outputs for user in value.users]
        for user in users:
            if user.end:
                return False
            if id(user) not in seen and kind_of(user) is not Kind.PRODUCT:
                seen.add(id(user))
                waiting.append(user)
    return True


def gated(product: Call, value: Value) -> Value | None:
    """The only factor that is a feature map, if all other factors are not negative."""
    maps = [part for part in product.inputs if part.shape == value.shape and not _positive(part)]
    others = [part for part in product.inputs if part not in maps]
    if len(maps) != 1 or not all(map(_positive, others)) or not _has_positive_numbers(product):
        return None
    divided = product.name.strip("_") in ("div", "truediv")
    return None if divided and product.inputs[0] is not maps[0] else maps[0]


def _positive(value: Value) -> bool:
    """True for the output of a sigmoid or ReLU, or of products of these, perhaps reshaped."""
    waiting, seen = [value], set[int]()
    while waiting:
        call = waiting.pop().maker
        if call is None:
            return False
        if id(call) in seen:
            continue
        seen.add(id(call))
        kind = kind_of(call)
        if kind in (Kind.PASSING, Kind.POOLING):
            waiting.append(call.inputs[0])
        elif kind is Kind.PRODUCT and _has_positive_numbers(call):
            waiting += call.inputs
        elif kind not in (Kind.RELU, Kind.BOUNDED):
            return False
    return True


def _has_positive_numbers(product: Call) -> bool:
    """True if all arguments that are no tensors are positive numbers, as far as can be seen."""
    arguments = (*product.arguments, *product.options.values())
    others = [value for value in arguments if not isinstance(value, Tensor)]
    return all(isinstance(value, (int, float)) and value > 0 for value in others)
