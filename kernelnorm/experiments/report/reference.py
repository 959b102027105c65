"""What the paper has of a case, and how a run's training differs from the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kernelnorm.experiments.recipes import RECIPES, Recipe, RunConfig, paper

__all__ = ["deviations", "paper_accuracy", "paper_lr", "paper_time"]

_TIMED_BATCH_SIZE = 32
_TOLD_APART = ("case", "epochs", "model_options", "lr_table")


def paper_accuracy(case: str, norm: str, batch_size: int) -> tuple[float, float] | None:
    """Return mean and deviation of the paper's Table 1, in percent; ``None`` if it has none."""
    values = _row(case, "accuracy", batch_size).get(norm)
    return None if values is None else (values[0], values[1])


def paper_lr(case: str, norm: str, batch_size: int) -> float | None:
    """Return the learning rate of the paper's Table 4."""
    lr: float | None = _row(case, "learning_rate", batch_size).get(norm)
    return lr


def paper_time(name: str, case: str, norm: str, batch_size: int) -> float | None:
    """Return ``seconds_per_epoch`` or ``minutes`` of the paper's Table 2."""
    if case not in paper() or batch_size != _TIMED_BATCH_SIZE:
        return None
    value: float | None = paper()[case]["time"][name].get(norm)
    return value


def deviations(config: RunConfig, found: Mapping[str, Any]) -> list[str]:
    """Return what differs from the training in the paper, as phrases.

    Nothing is returned where nothing differs, and for a case that is not the paper's.

    Args:
        config: the run's configuration.
        found: the rest of its ``config.yaml``.
    """
    if config.case not in paper():
        return []
    data, recipe = paper()[config.case]["data"], RECIPES[config.case]
    phrases = []
    for split, kind in (("train_images", "training"), ("test_images", "test")):
        images = found.get(split, config.subset)
        if images is not None and images != data[split]:
            phrases.append(f"{images:,} of {data[split]:,} {kind} images")
    if config.epochs != recipe.epochs:
        phrases.append(f"{config.epochs} epochs in place of {recipe.epochs}")
    options = {name: value for name, value in config.model_options.items() if name != "rules"}
    phrases += [f"{name} {value}" for name, value in sorted(options.items())]
    if config.private is not None:
        phrases.append(f"differential privacy with epsilon {config.private.epsilon:g}")
    if config.precision != "32-true":
        phrases.append(f"precision {config.precision}")
    for field in fields(Recipe):
        ours, theirs = getattr(config, field.name), getattr(recipe, field.name)
        if field.name not in _TOLD_APART and ours != theirs:
            phrases.append(f"{field.name} {ours} in place of {theirs}")
    return phrases


def _row(case: str, table: str, batch_size: int) -> dict[str, Any]:
    rows = paper().get(case, {}).get(table, {}).get("rows", [])
    return next((row for row in rows if row["batch_size"] == batch_size), {})
