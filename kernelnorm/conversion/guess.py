"""Guesses the calls of layers that were not recorded, from the order of registration."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from kernelnorm.conversion import kinds
from kernelnorm.conversion.record import Call, Value

__all__ = ["guessed_calls"]


def guessed_calls(network: nn.Module, recorded: Iterable[Call]) -> list[Call]:
    """Return one call for each layer without a recorded call.

    The layers of an :class:`torch.nn.Sequential` follow each other. In other modules only a
    convolution and a norm with the same number of channels do, in either order: where the module
    calls an activation that is registered next to them is not known.
    """
    seen, calls = {call.module for call in recorded}, list[Call]()
    for name, parent in network.named_modules():
        previous: Call | None = None
        in_order = type(parent).forward is nn.Sequential.forward
        for child_name, child in parent.named_children():
            if not kinds.is_layer(child) or child in seen:
                previous = None
                continue
            seen.add(child)
            call = Call(f"{name}.{child_name}".lstrip("."), child, name)
            follows = previous is not None and (in_order or _fit(previous.module, child))
            value = previous.outputs[0] if previous and follows else _value(None)
            value.users.append(call)
            call.inputs.append(value)
            call.outputs.append(_value(call))
            calls.append(call)
            previous = call
    return calls


def _value(maker: Call | None) -> Value:
    value = Value(maker, torch.Size(), 0)
    value.storage = id(value)
    return value


def _fit(first: nn.Module | None, second: nn.Module) -> bool:
    """True for a convolution and a norm with the same number of channels, in either order."""
    if isinstance(first, (*kinds.CONVOLUTIONS, *kinds.TRANSPOSED)):
        channels, norm = first.out_channels, second
    elif isinstance(second, (*kinds.CONVOLUTIONS, *kinds.TRANSPOSED)) and first is not None:
        channels, norm = second.in_channels, first
    else:
        return False
    return bool(kinds.name_of_norm(norm)) and kinds.channels_of_norm(norm) == channels
