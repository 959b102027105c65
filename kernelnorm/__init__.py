"""Kernel normalized convolutional networks: normalisation that does not depend on the batch."""

from kernelnorm import functional, models
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
    "backend",
    "functional",
    "models",
    "set_evaluation",
]

__version__ = "0.1.0"
