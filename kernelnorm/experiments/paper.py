"""The numbers of the paper's tables, and the learning rates made from them."""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from kernelnorm.experiments.recipes import Recipe
from kernelnorm.norms import describe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["AutoLR", "auto_lr", "paper", "paper_accuracy", "paper_lr", "paper_time"]

_TIMED_BATCH_SIZE = 32


@cache
def paper() -> dict[str, Any]:
    """Return the paper's figures (``paper.toml``) by case study: accuracy, learning rate, time."""
    return tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8"))


def paper_accuracy(case: str, norm: str, batch_size: int) -> tuple[float, float] | None:
    """Return mean and deviation of the paper's Table 1, in percent; ``None`` if it has none."""
    values = _row(case, "accuracy", batch_size).get(norm)
    return None if values is None else (values[0], values[1])


def paper_lr(case: str, norm: str, batch_size: int) -> float | None:
    """Return the learning rate of the paper's Table 4; ``None`` if it has none."""
    lr: float | None = _row(case, "learning_rate", batch_size).get(norm)
    return lr


def paper_time(name: str, case: str, norm: str, batch_size: int) -> float | None:
    """Return ``seconds_per_epoch`` or ``minutes`` of Table 2; ``None`` if it has none."""
    if case not in paper() or batch_size != _TIMED_BATCH_SIZE:
        return None
    value: float | None = paper()[case]["time"][name].get(norm)
    return value


def _row(case: str, table: str, batch_size: int) -> dict[str, Any]:
    rows = paper().get(case, {}).get(table, {}).get("rows", [])
    return next((row for row in rows if row["batch_size"] == batch_size), {})


class AutoLR(NamedTuple):
    """A learning rate and its source; ``exact``: the paper has it for this case."""

    lr: float
    source: str
    exact: bool


def auto_lr(recipe: Recipe, norm: str, batch_size: int, optimizer: str = "sgd") -> AutoLR:
    r"""Return the learning rate of ``--lr auto``: the paper's (Table 4), or one made from it.

    For a batch size that is not in the table, the rate of the nearest one (by ratio) is multiplied
    by :math:`(\text{batch size} / \text{nearest})^{0.75}` and rounded to two significant digits.
    The exponent is the one of 0.5, 0.75 and 1 that fits most columns of the table best. For a
    normalisation that is not in the table, the column is that of GroupNorm, or that of BatchNorm if
    the normalisation depends on the batch. For AdamW the rate is PyTorch's default, 0.001.

    Example::

        >>> from kernelnorm.experiments.recipes import RECIPES
        >>> auto_lr(RECIPES["cifar10-vgg8"], "kernel", 32)
        AutoLR(lr=0.025, source='Table 4(a), KernelNorm, batch size 32', exact=True)
    """
    if optimizer == "adamw":
        return AutoLR(1e-3, "PyTorch's default for AdamW", exact=False)
    table = paper()[recipe.lr_table]["learning_rate"]
    row = min(table["rows"], key=lambda row: abs(math.log(row["batch_size"] / batch_size)))
    substitute = "batch" if describe(norm).group == "batch-dependent" else "group"
    column = norm if norm in row else substitute
    lr, nearest = row[column], row["batch_size"]
    source = f"{table['table']}, {column.capitalize()}Norm, batch size {nearest}"
    exact = column == norm and nearest == batch_size and recipe.case == recipe.lr_table
    if nearest != batch_size:
        lr = float(f"{lr * (batch_size / nearest) ** 0.75:.2g}")
        source = f"{row[column]:g} ({source}) times ({batch_size}/{nearest})^0.75"
    if recipe.case != recipe.lr_table:
        source += f", for {recipe.lr_table}"
    return AutoLR(lr, source, exact)
