"""What private training with bookkeeping refuses: networks and options that it cannot clip."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kernelnorm.norms import BatchChannelNorm2d, BatchRenorm2d
from kernelnorm.privacy.layers import LAYERS

_OF_BATCHES = (BatchRenorm2d, BatchChannelNorm2d)
"""Norms that mix samples, which Opacus' validator does not know."""


def trained_parameters(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters of a layer, without those of its children, and their names."""
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.requires_grad:
            yield name, parameter


def layers_of(network: nn.Module) -> dict[nn.Module, str]:
    """The layers with trained parameters, and their names.

    Raises:
        NotImplementedError: bookkeeping cannot train one of them
    """
    names: dict[nn.Module, str] = {}
    owners: dict[nn.Parameter, str] = {}
    problems = []
    for name, layer in network.named_modules(remove_duplicate=False):
        parameters = dict(trained_parameters(layer))
        if not parameters:
            continue
        if layer in names:
            problems.append(f"{name!r} is also {names[layer]!r}")
            continue
        names[layer] = name
        if type(layer) not in LAYERS or not {*parameters} <= {"weight", "bias"}:
            problems.append(f"{name!r} is a {type(layer).__module__}.{type(layer).__qualname__}")
        elif "forward" in vars(layer):
            problems.append(f"the forward method of {name!r} was replaced")
        for p_name, parameter in parameters.items():
            if parameter in owners:
                problems.append(f"{p_name!r} of {name!r} also belongs to {owners[parameter]!r}")
            if parameter.dtype not in (torch.float32, torch.float64):
                problems.append(f"{p_name!r} of {name!r} is in {parameter.dtype}")
            owners[parameter] = name
    if problems:
        known = ", ".join(layer.__name__ for layer in LAYERS)
        raise NotImplementedError(
            f"bookkeeping trains {known} with parameters of their own in float32 or float64, but "
            f"{'; '.join(problems)}. "
            'Use grad_sample_mode="hooks", or set requires_grad to False'
        )
    return names


def norms_with_statistics(network: nn.Module) -> dict[nn.Module, str]:
    """The norms that take or track statistics of batches in some modes, and their names.

    Raises:
        NotImplementedError: a norm takes them in all modes
    """
    norms = {}
    for name, layer in network.named_modules():
        if isinstance(layer, _OF_BATCHES):
            raise NotImplementedError(
                f"{name!r} is a {type(layer).__name__}, which takes statistics of batches, so "
                "samples cannot be clipped: replace it by another norm"
            )
        # BatchNorm, InstanceNorm, and classes like them, which need not be derived from PyTorch's
        if hasattr(layer, "track_running_stats") and hasattr(layer, "running_mean"):
            norms[layer] = name
    return norms


def check_statistics(norms: dict[nn.Module, str]) -> None:
    """Check that no norm normalises by statistics of the batch or updates running statistics.

    Raises:
        RuntimeError: a norm does, and neither clipping nor noise covers these statistics
    """
    for layer, name in norms.items():
        running = layer.running_mean is not None
        of_images = any("InstanceNorm" in base.__name__ for base in type(layer).__mro__)
        mixes = not of_images and (layer.training or not running)
        if mixes or (layer.training and running):
            raise RuntimeError(
                f"{name!r} is a {type(layer).__name__} that takes statistics of the training "
                "images, which have no clipping and no noise. Replace it by another norm, or "
                "freeze it: call eval() on it after train() on the network"
            )


def check_options(
    module: nn.Module, optimizer: Optimizer, max_grad_norm: float, noise_multiplier: float | None
) -> None:
    """Check the arguments of ``make_private``.

    Raises:
        ValueError: bookkeeping does not support one of them, or the optimizer lacks a parameter
    """
    if isinstance(module, DistributedDataParallel | FSDPModule | nn.DataParallel):
        raise ValueError(
            'grad_sample_mode="bookkeeping" needs opacus.distributed.'
            "DifferentiallyPrivateDistributedDataParallel around the network, got "
            f"{type(module).__name__}"
        )
    if not isinstance(max_grad_norm, int | float) or not 0 < max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm must be a positive number, got {max_grad_norm!r}")
    if noise_multiplier is not None and not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be at least 0, got {noise_multiplier!r}")
    given = {p for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in module.named_parameters() if p.requires_grad and p not in given]
    if missing:
        raise ValueError(
            f"the optimizer lacks {', '.join(map(repr, missing[:3]))}"
            f"{', ...' * (len(missing) > 3)}, which the network trains: give it to the optimizer, "
            "or set requires_grad to False"
        )
