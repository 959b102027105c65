"""Converts convolutional networks to KNConvNets; the entry is :func:`kernelnorm.convert`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kernelnorm.conversion import kinds
from kernelnorm.conversion.dims import spatial_dims
from kernelnorm.conversion.guess import guessed_calls
from kernelnorm.conversion.plan import Fate, Plan, make_plan
from kernelnorm.conversion.record import Call, record
from kernelnorm.conversion.replace import carry_out
from kernelnorm.conversion.report import Report, Row
from kernelnorm.models.rules import Rules, as_rules
from kernelnorm.ops.containers import with_tensors_copied

__all__ = ["Report", "Row", "convert"]

Network = TypeVar("Network", bound=nn.Module)


def convert(
    model: Network,
    example_input: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    rules: Rules | Mapping[str, Any] | None = None,
    norms: Collection[str] = ("batch",),
    inplace: bool = False,
) -> tuple[Network, Report]:
    r"""Convert a network to a KNConvNet: a KNConv replaces each convolution and its norm.

    The network keeps its class, the names of its modules, its control flow and the weights of its
    convolutions; a KNConv gets a bias of zeros if its convolution had none. The conversion follows
    the rules in :class:`kernelnorm.models.Rules`, by default the paper's:

    - Convolutions with a norm directly before or after them become KNConvs of the same shape.
      Others stay: gates of squeeze-and-excite, final classifiers, transposed convolutions, and
      convolutions whose windows have fewer than 8 elements.
    - The norms of KNConvs are removed. A norm without a KNConv (after a convolution that stays, or
      without any convolution) becomes a KernelNorm with windows of one pixel.
    - A ReLU moves into the KNConvs that compute its input, also through sums, concatenations and
      pooling. A LeakyReLU moves into the KNConv directly before it. Other activations, and ReLUs
      that the network calls as functions, stay in their place.
    - A KernelNorm is added before the final pooling, unless the input of the pooling is the output
      of a KNConv with a fused ReLU, as in VGG8.

    Train the network after the conversion: KNConvs normalise by other statistics, so the same
    weights give other outputs. Build the optimizer after converting. For training from scratch
    draw new weights with :func:`kernelnorm.models.init_convolutions`.

    Args:
        model: the network; a copy is converted
        example_input: an input, the tuple of positional arguments, or the mapping of keyword
            arguments. The network runs on it once, in evaluation mode, to record which layer feeds
            which. Without it the conversion follows the order in which layers are registered, only
            ReLUs inside of an :class:`torch.nn.Sequential` move, no KernelNorm is added before the
            pooling, and the report calls these decisions guesses
        rules: the rules, or a mapping with fields of :class:`kernelnorm.models.Rules` (default: the
            paper's rules)
        norms: the norms that are converted, any of ``"batch"`` (with its synchronised and frozen
            forms), ``"group"`` and ``"instance"``
        inplace: converts ``model`` itself, not a copy

    Returns:
        The converted network, and a :class:`Report`: ``print(report)`` is a table of all layers,
        and ``report.unconverted`` lists the layers that could not be converted, with the reasons.

    Raises:
        TypeError: the model is not a module, has a scripted module, or is a
            DistributedDataParallel
        ValueError: the model has no such norms, has lazy modules without shapes, or cannot be
            copied; ``rules`` or ``norms`` has a wrong value; the model cannot run on
            ``example_input``; or only an ``example_input`` can tell the dimensions of a norm's
            input

    Source: Section 3, rules I to IV.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> network, report = convert(model, torch.randn(1, 3, 8, 8))
        >>> print(report)
        module  before       after     why
        0       Conv2d       KNConv2d  rule I
        1       BatchNorm2d  removed   rule II: the KNConv normalises its input
        2       ReLU         removed   rule III: moved into the KNConv before it
        <BLANKLINE>
        1 KNConvs, 0 KernelNorms, nothing unconverted
        Build the optimizer after converting: new parameters: 1, removed: 2.
    """
    given = as_rules({} if rules is None else rules)
    _check(model, norms)
    with torch.inference_mode(False):  # new parameters are ordinary ones
        network = model if inplace else _copied(model)
        recorded = [] if example_input is None else _recorded(network, example_input)
        guesses = guessed_calls(network, recorded)
        plan = make_plan([*recorded, *guesses], norms, given)
        old = {name: type(module).__name__ for name, module in network.named_modules()}
        parameters = {*network.parameters()}
        carry_out(plan, spatial_dims(plan, [*recorded, *guesses]), given)
    guessed = {call.module for call in guesses}
    return network, _report(network, plan, old, parameters, guessed, recorded, norms)


def _check(model: nn.Module, norms: Collection[str]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "cannot convert a DistributedDataParallel: convert its module, then wrap it"
        )
    listed = isinstance(norms, Collection) and not isinstance(norms, str)
    if not listed or not norms or any(norm not in [*kinds.NORMS] for norm in norms):
        raise ValueError(
            f"norms must be names from {', '.join(kinds.NORMS)}, in a list, got {norms!r}"
        )
    for name, module in model.named_modules():
        where = f"its module {name!r}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"cannot convert model: {where} is scripted. Convert the model first, script it "
                "then"
            )
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"cannot convert model: {where} is lazy and has no shape yet. Call the model once "
                "first: model(input)"
            )
    found = {kinds.name_of_norm(module) for module in model.modules()} - {None}
    if not found.intersection(norms):
        others = ", ".join(f"{name!r}" for name in kinds.NORMS if name in found)
        raise ValueError(
            f"model has no norm of the kinds {', '.join(norms)}, so there is nothing to convert"
            + (f". It has {others}: name these in norms" if others else "")
        )


def _copied(model: Network) -> Network:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"model cannot be copied ({type(error).__name__}: {error}). Pass inplace=True to "
            "convert the model itself"
        ) from error


def _recorded(network: nn.Module, example_input: Any) -> list[Call]:
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = {}
    if isinstance(example_input, Mapping):
        options = example_input
    else:
        arguments = example_input if type(example_input) is tuple else (example_input,)
    try:
        arguments, options = with_tensors_copied((arguments, options))
        return record(network, arguments, options, kinds.is_layer)
    except Exception as error:
        raise ValueError(
            f"model cannot run on example_input ({type(error).__name__}: {error}). Pass an input "
            "for which model(example_input) works, a tuple of several arguments, or a dict of "
            "keyword arguments"
        ) from error


def _report(
    network: nn.Module,
    plan: Plan,
    old: Mapping[str, str],
    parameters: set[nn.Parameter],
    guessed: Collection[nn.Module | None],
    recorded: Collection[Call],
    norms: Collection[str],
) -> Report:
    rows, unconverted = [], []
    for name, module in network.named_modules():
        if module in plan.why:
            why = plan.why[module] + (" (a guess)" if module in guessed else "")
            rows.append(Row(name, old[name], _description(module), why))
            if plan.fates.get(module) is Fate.UNCONVERTED:
                unconverted.append(rows[-1])
    called = {f"{name}_norm" for name in norms}
    for call in recorded:
        if call.module is None and call.name in called and _comes_from_a_layer(call):
            why = "a norm that is called as a function stays"
            row = Row(call.owner, f"{call.name}()", f"{call.name}()", why)
            if row not in unconverted:
                rows.append(row)
                unconverted.append(row)
    now = {*network.parameters()}
    notes = [
        f"Build the optimizer after converting: new parameters: {len(now - parameters)}, "
        f"removed: {len(parameters - now)}."
    ]
    if functions := [*plan.activations.functions]:
        others = f" (and {len(functions) - 1} other modules)" if functions[1:] else ""
        notes.append(
            f"{functions[0] or 'The model'}{others} calls a ReLU as a function: it stays, and its "
            "output is kept for the backward pass. KNConvs take over nn.ReLU modules."
        )
    if any(module in plan.why for module in guessed):
        notes.append(
            "Guesses follow the order of registration, since no recorded call shows the layers. "
            "Pass an example_input, or compare with the model's forward."
        )
    return Report(rows, unconverted, notes)


def _comes_from_a_layer(call: Call) -> bool:
    """False for functions of parameters, such as a weight that is standardised."""
    maker = call.inputs[0].maker if call.inputs else None
    while maker is not None and kinds.kind_of(maker) is kinds.Kind.PASSING:
        maker = maker.inputs[0].maker
    return maker is not None


def _description(module: nn.Module) -> str:
    """The class of a module, or of the parts that took its place."""
    if type(module) is not nn.Sequential:
        return "removed" if type(module) is nn.Identity else type(module).__name__
    parts = [type(part).__name__ for part in module if type(part) is not nn.Identity]
    return " + ".join(parts) or "removed"
