"""Makes the configurations of the runs of a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.networks import build_network
from kernelnorm.experiments.recipes import Recipe

__all__ = ["make_grid"]


def make_grid(
    recipe: Recipe,
    *,
    norms: Sequence[str],
    batch_sizes: Sequence[int],
    lrs: Sequence[float] | Literal["auto"] = "auto",
    seeds: Sequence[int] = (0,),
    rules: Sequence[Mapping[str, Any]] = ({},),
    **choices: Any,
) -> list[RunConfig]:
    """Make the configurations of a grid, each once, those of large batches first.

    Args:
        recipe: from :func:`kernelnorm.experiments.recipes.recipe_for`.
        norms: some of :data:`kernelnorm.norms.NORMS`.
        batch_sizes: images per step.
        lrs: the learning rates; ``"auto"`` is the paper's for each norm and batch size.
        seeds: of initial weights, order, augmentation and dropout.
        rules: variants of the kernel networks, each with the rules that differ from the paper's.
            Other norms have no rules, and are in the grid once.
        choices: values that replace the recipe's in all runs, as in :func:`configure`.

    Raises:
        RunError: a value is out of its range, a network cannot be made, or there are no runs.

    Example::

        >>> from kernelnorm.experiments.recipes import RECIPES
        >>> recipe = RECIPES["cifar10-vgg8"]
        >>> grid = make_grid(recipe, norms=["batch", "kernel"], batch_sizes=[2, 32])
        >>> [(run.batch_size, run.norm, run.lr) for run in grid]
        [(32, 'batch', 0.01), (32, 'kernel', 0.025), (2, 'batch', 0.0025), (2, 'kernel', 0.001)]
    """
    options = choices.pop("model_options", recipe.model_options)
    runs = [
        configure(
            recipe,
            norm=norm,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            model_options=_with_rules(options, variant),
            **choices,
        )
        for batch_size in sorted(batch_sizes, reverse=True)
        for norm in norms
        for variant in (rules if norm == "kernel" else ({},))
        for lr in ((None,) if lrs == "auto" else lrs)
        for seed in seeds
    ]
    if not runs:
        raise RunError(
            "the sweep has no runs: one of its lists (norms, batch sizes, learning rates, seeds) "
            "is empty"
        )
    for run in {(run.norm, str(run.model_options)): run for run in runs}.values():
        with torch.device("meta"):  # finds wrong options before a run starts
            build_network(run, num_classes=10, in_channels=3)
    return list({run.name: run for run in runs}.values())


def _with_rules(options: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model options with a variant's rules added; these take precedence."""
    own = options.get("rules") or {}
    if not variant or not isinstance(own, Mapping):  # build_network reports wrong rules
        return {**options}
    return {**options, "rules": {**own, **variant}}
