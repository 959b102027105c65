"""Rule IV: finds the place of the KernelNorm before the final pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from kernelnorm.conversion import kinds
from kernelnorm.conversion.flow import Flow, is_global_pooling
from kernelnorm.conversion.kinds import Kind, kind_of
from kernelnorm.conversion.record import Call
from kernelnorm.models.rules import Rules

__all__ = ["Head", "plan_head"]


@dataclass(frozen=True)
class Head:
    """The KernelNorm before the final pooling, perhaps with a ReLU; it replaces a module.

    Args:
        module: the module that it replaces
        where: ``"norm"``: in place of that norm; ``"before"``: before that activation;
            ``"after"``: after that ReLU, with a ReLU of its own; ``"pooling"``: before that
            pooling, with a ReLU of its own
        replaces: the call of a ReLU that the head's own ReLU replaces
    """

    module: nn.Module
    where: Literal["norm", "before", "after", "pooling"]
    replaces: Call | None = None


def plan_head(flow: Flow, rules: Rules) -> Head | None:
    """Find the place of the KernelNorm, or return ``None`` if the network gets none.

    The KernelNorm comes before the pooling of a sum, of a concatenation, of a pre-activation, or of
    a KNConv with an activation other than a ReLU. After a KNConv that takes over its ReLU there is
    none, as in VGG8.
    """
    pooling = _final_pooling(flow)
    if pooling is None:
        return None
    activation: Call | None = None
    call, value = pooling.inputs[0].maker, pooling.inputs[0]
    while call is not None:
        if call.module in flow.norms and not flow.before[call.module]:
            return Head(call.module, "norm") if _called_once(flow, call) else None
        if activation is None and kind_of(call) in kinds.ACTIVATIONS:
            activation = call
        elif call.module not in flow.norms and kind_of(call) is not Kind.PASSING:
            break
        value = call.inputs[0]
        call = value.maker
    if call is None:
        return None
    kind, relu = kind_of(call), activation is None or kind_of(activation) is Kind.RELU
    combined = kind in (Kind.SUM, Kind.CONCATENATION)
    if not combined and (relu or kind is not Kind.CONVOLUTION):
        return None
    moved = rules.residual_relu == "branch" or kind is not Kind.SUM
    if activation is not None and activation.module is not None and _called_once(flow, activation):
        return Head(activation.module, "before" if moved or not relu else "after")
    if combined and pooling.module is not None and _called_once(flow, pooling):
        alone = activation is not None and all(len(v.users) == 1 for v in activation.outputs)
        return Head(pooling.module, "pooling", activation if moved and alone else None)
    return None


def _final_pooling(flow: Flow) -> Call | None:
    """The last global pooling that is not followed by maps of more than one pixel."""
    poolings = (call for call in reversed(flow.calls) if is_global_pooling(call))
    return next((call for call in poolings if not _leads_to_maps(call)), None)


def _leads_to_maps(pooling: Call) -> bool:
    """True if maps of several pixels follow, as after the pooling of a squeeze-and-excite gate."""
    dims, seen, waiting = len(pooling.inputs[0].shape), {id(pooling)}, [pooling]
    while waiting:
        users = [user for value in waiting.pop().outputs for user in value.users]
        for user in users:
            if id(user) not in seen and not user.end:
                if any(len(v.shape) >= dims and v.shape[2:].numel() > 1 for v in user.outputs):
                    return True
                seen.add(id(user))
                waiting.append(user)
    return False


def _called_once(flow: Flow, call: Call) -> bool:
    """True if it is the only call of its layer, and its output has one use."""
    assert call.module is not None
    alone = all(len(value.users) <= 1 for value in call.outputs)
    return alone and len(flow.calls_of[call.module]) == 1
