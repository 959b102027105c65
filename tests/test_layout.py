"""The way of data is downwards: a file imports from files above it in this list, never below."""

from __future__ import annotations

from pathlib import Path

ORDER = [
    "reference",
    "ops.mask",
    "ops.windows",
    "ops.rows_torch",
    "ops",
    "ops.knconv",
    "arguments",
    "functional",
    "modules",
    "kernelnorm",
    "norms",
    "models.blocks",
    "models.vgg",
    "models.resnet",
    "models.densenet",
    "models",
    "experiments",
    "experiments.recipes",
    "cli",
]
PACKAGE = Path(__file__).parent.parent / "kernelnorm"
