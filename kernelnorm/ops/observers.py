"""Detects what observes a call: compilers, exporters, transforms, dispatch modes, autocast.

Private functions of PyTorch are called in this file only; docs/design.md lists all private names
with their reasons.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_ORDINARY = (Tensor, torch.nn.Parameter)

_DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
_AUTOCAST = tuple(device for device in _DEVICES if torch.amp.is_autocast_available(device))


def needs_plain_operations(*tensors: Tensor | None) -> bool:
    """True if the call has to consist of PyTorch's own operations.

    Functional transforms (``vmap``, ``grad``, ...), tensor subclasses and counters of FLOPs have
    rules for these only, and an exported program runs without this library.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or _counts_flops()
        or _is_exporting()
        or _is_tracing()
        or any(x is not None and type(x) not in _ORDINARY for x in tensors)
    )


def is_observed() -> bool:
    """True if a compiler, a tracer or a dispatch mode must see the call as an operator."""
    return torch.compiler.is_compiling() or bool(_get_current_dispatch_mode_stack())


def _is_exporting() -> bool:
    """The flag of ``torch.compiler.is_exporting()``, which older compilers replace by True."""
    return torch.compiler._is_exporting_flag


def _is_tracing() -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing


def _counts_flops() -> bool:
    """True under ``torch.utils.flop_counter``. Compares names: the import takes long."""
    if torch.compiler.is_compiling():
        return False
    modes = map(type, _get_current_dispatch_mode_stack())
    return any(mode.__module__ == "torch.utils.flop_counter" for mode in modes)


def sizes(x: Tensor) -> torch.Size:
    """The shape, in plain integers even where ``torch.jit.trace`` makes them tensors."""
    if not _is_tracing():
        return x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return torch.Size(map(int, x.shape))


def is_autocast_on(x: Tensor) -> bool:
    """True if autocast is enabled for the device of ``x``."""
    device = x.device.type
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives the arguments of a convolution."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if is_autocast_on(x) else x


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast changes no dtypes."""
    if is_autocast_on(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def has_storage(x: Tensor) -> bool:
    """False for a batched tensor, such as the gradients of ``is_grads_batched=True``."""
    if torch.compiler.is_compiling():
        return True
    try:
        x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Check that ``torch.autograd.forward_ad`` does not differentiate the call.

    Autograd drops a tangent silently at an operator if no input requires a gradient.

    Raises:
        NotImplementedError: a tensor has a tangent.
    """
    try:
        found = any(x is not None and unpack_dual(x).tangent is not None for x in tensors)
    except RuntimeError:  # a dispatch mode calls the operator; it was checked before
        return
    if found:
        raise NotImplementedError(
            "a compiled KNConv, or one under a dispatch mode, has no derivative of "
            "torch.autograd.forward_ad: use torch.func.jvp"
        )


def version(x: Tensor) -> int:
    """How often the tensor was changed in place; views and bases count together."""
    return x._version


def called_as_leaf(module: torch.nn.Module, input: object) -> Any:
    """Record a call of the module for ``torch.fx``, as it records those of ``torch.nn``.

    Returns ``None`` if ``input`` is no proxy of ``torch.fx``: then nothing is being traced.
    """
    if not isinstance(input, torch.fx.Proxy):
        return None
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), {})
