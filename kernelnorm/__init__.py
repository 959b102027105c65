"""Kernel normalized convolutional networks: normalisation that does not depend on the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernelnorm import functional, models
from kernelnorm.conversion import Report, convert
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

if TYPE_CHECKING:
    from kernelnorm.experiments.trained import load

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
    "load",
    "models",
    "set_evaluation",
]

__version__ = "0.2.0.dev0"


def __getattr__(name: str) -> Any:
    if name != "load":  # which needs the packages of kernelnorm[experiments]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kernelnorm.experiments.trained import load

    return load


def __dir__() -> list[str]:
    return sorted(__all__)
