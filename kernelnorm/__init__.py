"""Kernel normalized convolutional networks: normalisation that does not depend on the batch.

The public names are imported when they are first used, so that ``import kernelnorm`` alone, and
with it the help of the command line, does not import PyTorch. ``kernelnorm.privacy`` and
``kernelnorm.timm``, which need Opacus and timm, are imported by their own names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelnorm import functional, hub, models, norms
    from kernelnorm.conversion import Report, convert
    from kernelnorm.experiments.trained import load
    from kernelnorm.functional import backend
    from kernelnorm.modules import (
        KernelNorm1d,
        KernelNorm2d,
        KernelNorm3d,
        KNConv1d,
        KNConv2d,
        KNConv3d,
        set_evaluation,
    )

__all__ = [
    "KNConv1d",
    "KNConv2d",
    "KNConv3d",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm3d",
    "Report",
    "backend",
    "convert",
    "functional",
    "hub",
    "load",
    "models",
    "norms",
    "set_evaluation",
]

__version__ = "0.2.0.dev0"

_SUBMODULES = {"functional", "hub", "models", "norms"}
_SOURCES = {
    "KNConv1d": "modules",
    "KNConv2d": "modules",
    "KNConv3d": "modules",
    "KernelNorm1d": "modules",
    "KernelNorm2d": "modules",
    "KernelNorm3d": "modules",
    "Report": "conversion",
    "backend": "functional",
    "convert": "conversion",
    "load": "experiments.trained",
    "set_evaluation": "modules",
}
"""The module of each public name that is not a submodule itself."""

if not TYPE_CHECKING:  # else type checkers would accept every name as an attribute

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return import_module(f"{__name__}.{name}")
        if name not in _SOURCES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = import_module(f"{__name__}.{_SOURCES[name]}")
        except ModuleNotFoundError as error:
            if name != "load" or error.name == "torch":
                raise
            message = f"kernelnorm.load needs {error.name}: pip install '.[experiments]'"
            raise ModuleNotFoundError(message, name=error.name) from error
        value = getattr(module, name)
        globals()[name] = value  # later uses skip this function
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
