"""The paper's protocol for one of its cases, at the paper's scale or at a small one for a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.paper import paper
from kernelnorm.experiments.recipes import RECIPES
from kernelnorm.experiments.sweep.grid import make_grid
from kernelnorm.experiments.sweep.plan import Tuned
from kernelnorm.experiments.tuning import TUNING_SEED

__all__ = ["PAPER_NORMS", "Scale", "reproduction", "scale_of"]

PAPER_NORMS = ("batch", "group", "layer", "kernel")


@dataclass(frozen=True)
class Scale:
    """The size of a reproduction.

    Args:
        batch_sizes: the batch sizes that are trained.
        choices: values that replace the recipe's.
    """

    batch_sizes: tuple[int, ...]
    choices: dict[str, Any] = field(default_factory=dict)


_SMALL = {
    "digits-vgg8": Scale((8, 32), {"subset": 500, "epochs": 4}),
    "cifar10-vgg8": Scale(
        (2, 32, 256),
        # The paper feeds all norms pixels from 0 to 1, which KernelNorm alone standardises.
        {"subset": 2500, "epochs": 8, "standardise": True, "model_options": {"width": 0.5}},
    ),
    "imagenette-densenet121": Scale((2, 32), {"subset": 1000, "image_size": 64, "epochs": 8}),
    "imagewoof-resnet18": Scale((16, 64), {"subset": 1000, "image_size": 96, "epochs": 8}),
}


def scale_of(case: str, scale: Literal["small", "paper"]) -> Scale:
    """Return the scale of a case.

    Args:
        case: the case study.
        scale: ``"paper"``: the batch sizes of the paper's Table 1; ``"small"``: sized for a CPU.

    Raises:
        RunError: the case is unknown, or has no scale ``"paper"``.
    """
    if case not in RECIPES:
        raise RunError(f"unknown case {case!r}: choose from {', '.join(RECIPES)}")
    if scale == "small":
        return _SMALL[case]
    if case not in paper():
        raise RunError(f"{case} is not in the paper: take --scale small, or {', '.join(paper())}")
    return Scale(tuple(row["batch_size"] for row in paper()[case]["accuracy"]["rows"]))


def reproduction(
    case: str,
    scale: Literal["small", "paper"],
    *,
    norms: Sequence[str] = PAPER_NORMS,
    batch_sizes: Sequence[int] | None = None,
    seeds: Sequence[int] = (1, 2, 3),
    every_rate: bool = False,
) -> Tuned:
    """Plan the paper's experiments of a case: Appendix B's tuning, with seed 0, then repetitions.

    Args:
        case: the case study.
        scale: see :func:`scale_of`.
        norms: the normalisations.
        batch_sizes: the batch sizes; default: those of the scale.
        seeds: of the repetitions.
        every_rate: try all learning rates of the paper's list.

    Raises:
        RunError: a value is out of its range.
    """
    size = scale_of(case, scale)
    recipe = RECIPES[case]
    if TUNING_SEED in seeds:
        raise RunError(
            f"seed {TUNING_SEED} is the seed of the tuning: give the repetitions other seeds"
        )
    cells = make_grid(
        recipe,
        norms=norms,
        batch_sizes=batch_sizes or size.batch_sizes,
        seeds=[TUNING_SEED],
        **size.choices,
    )
    note = ""
    if scale == "small":
        changed = {**size.choices, **size.choices.get("model_options", {})}
        changed.pop("model_options", None)
        what = ", ".join(f"{name} {value}" for name, value in changed.items())
        note = f"Scale small ({what}): not the paper's experiment, and not to be compared with it."
    rates = paper()[recipe.lr_table]["learning_rate"]["tried"]
    return Tuned(cells, rates, tuple(dict.fromkeys(seeds)), every_rate, note)
