"""Changes the class of modules in place, so that all references to a module stay valid."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from kernelnorm.conversion import kinds
from kernelnorm.conversion.head import Head
from kernelnorm.conversion.layers import Copy, KNConv2dSame
from kernelnorm.conversion.plan import Fate, Plan
from kernelnorm.models.rules import Rules
from kernelnorm.modules import (
    KernelNorm1d,
    KernelNorm2d,
    KernelNorm3d,
    KNConv1d,
    KNConv2d,
    KNConv3d,
)

__all__ = ["carry_out"]

_KERNEL_NORMS = {1: KernelNorm1d, 2: KernelNorm2d, 3: KernelNorm3d}
_KN_CONVS = ((nn.Conv1d, KNConv1d), (nn.Conv2d, KNConv2d), (nn.Conv3d, KNConv3d))


def carry_out(plan: Plan, dims: Mapping[nn.Module, int], rules: Rules) -> None:
    """Carry out a plan: change the network in place.

    Args:
        plan: the plan
        dims: the spatial dimensions of the maps that each layer takes
        rules: the dropout and the evaluation of the new layers
    """
    copied, new = plan.activations.copied, dict[nn.Module, nn.Module]()
    for module in plan.activations.removed:
        new[module] = Copy() if module in copied else nn.Identity()
    for module, fate in plan.fates.items():
        if fate is Fate.REMOVED:
            new[module] = _with_rest(Copy() if module in copied else nn.Identity(), module)
        elif fate is Fate.PIXELS:
            new[module] = _with_rest(_pixel_norm(dims[module], rules.dropout_p, rules), module)
    if plan.head is not None:
        norm = _pixel_norm(dims[plan.head.module], rules.head_dropout_p, rules)
        new[plan.head.module] = _head(plan.head, norm)
    # All new layers are built: nothing below can fail and leave the network half converted.
    for module, fate in plan.fates.items():
        if fate is Fate.KN_CONV:
            _become_kn_conv(module, plan.activations.taken.get(module), rules)
    for module, layer in new.items():
        _become(module, layer)


def _head(head: Head, norm: nn.Module) -> nn.Module:
    module = head.module
    if head.where == "norm":
        return _with_rest(norm, module)
    layers = {
        "before": {"norm": norm, "act": _twin(module)},
        "after": {"sum_act": _twin(module), "norm": norm, "act": nn.ReLU()},
        "pooling": {"norm": norm, "act": nn.ReLU(), "pool": _twin(module)},
    }[head.where]
    return nn.Sequential(OrderedDict(layers))


def _pixel_norm(dims: int, dropout_p: float, rules: Rules) -> nn.Module:
    return _KERNEL_NORMS[dims](1, dropout_p=dropout_p, evaluation=rules.evaluation)


def _become_kn_conv(convolution: nn.Module, activation: nn.Module | None, rules: Rules) -> None:
    """Make a convolution a KNConv with the same parameters, and a bias of zeros if it has none."""
    kind = next(new for old, new in _KN_CONVS if isinstance(convolution, old))
    if type(convolution).__name__ == "Conv2dSame":
        kind = KNConv2dSame
    convolution.__class__ = kind
    assert isinstance(convolution, (KNConv1d, KNConv2d, KNConv3d))
    convolution.dropout_p, convolution.eps = rules.dropout_p, 1e-5
    convolution.evaluation = rules.evaluation
    if isinstance(activation, nn.LeakyReLU):
        convolution.activation = nn.LeakyReLU(activation.negative_slope)
    else:
        convolution.activation = None if activation is None else "relu"
    if convolution.bias is None:
        weight = convolution.weight
        bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        convolution.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def _with_rest(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """The layer, followed by the layers inside of the norm, such as its activation."""
    rest = kinds.layers_inside(norm)
    name = "norm" if "norm" not in rest else "kernel_norm"
    return nn.Sequential(OrderedDict([(name, layer), *rest.items()])) if rest else layer


def _twin(module: nn.Module) -> nn.Module:
    """A module with the same attributes, but not the same hooks."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if "hook" in name and isinstance(value, dict):
            vars(twin)[name] = type(value)()
    return twin


def _become(module: nn.Module, new: nn.Module) -> None:
    """Give ``module`` the class and attributes of ``new``; its hooks and training mode stay."""
    hooks = {name: value for name, value in vars(module).items() if "hook" in name}
    new.training = module.training
    for layer in new.children():
        layer.training = module.training
    module.__class__ = new.__class__
    vars(module).clear()
    vars(module).update({**vars(new), **hooks})
