"""Accuracy against privacy on CIFAR-10: a study.

    python benchmarks/private_cifar10.py --data-dir data            trains what is missing
    python benchmarks/private_cifar10.py --data-dir data --dry-run  lists the runs

For each norm and budget, seed 0 searches the learning rate, as ``kernelnorm reproduce`` does; other
seeds repeat the best one. Stop it at will, and run it again to resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.privacy import Privacy
from kernelnorm.experiments.recipes import RECIPES
from kernelnorm.experiments.sweep import LocalPool, dry_run, make_grid, sweep
from kernelnorm.experiments.sweep.plan import Tuned

STAGES = (
    (3.0, ("kernel", "group"), (1, 2, 3)),
    (1.0, ("kernel", "group"), (1, 2, 3)),
    (8.0, ("kernel", "group"), (1, 2, 3)),
    (3.0, ("layer", "ws_group", "none"), (1,)),
    (1.0, ("layer", "ws_group", "none"), (1,)),
    (8.0, ("layer", "ws_group", "none"), (1,)),
)
"""Budgets, norms and seeds of the repetitions, in the order in which they are trained."""
RATES = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)
CHOICES: dict[str, Any] = {
    "batch_sizes": [1024],
    "epochs": 10,
    "schedule": "cosine",
    "model_options": {"width": 0.25},
    "image_size": 16,
}
NOTE = "VGG8 of a quarter of the width, images of 16 pixels, 10 epochs: small, for a CPU."


def stage(epsilon: float, norms: tuple[str, ...], seeds: tuple[int, ...]) -> Tuned:
    """Returns the runs of a stage."""
    private = Privacy(epsilon=epsilon, micro_batch_size=256)
    recipe = RECIPES["cifar10-vgg8"]
    cells = make_grid(recipe, norms=norms, lrs=[0.5], private=private, **CHOICES)
    return Tuned(cells, RATES, seeds, note=NOTE)


def main() -> None:
    """Trains the stages, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/private-cifar10"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs")
    args = parser.parse_args()
    for plan in (stage(*options) for options in STAGES):
        if args.dry_run:
            dry_run(plan, args.out, args.jobs)
        else:
            pool = LocalPool(
                Launch(data_dir=args.data_dir, accelerator="cpu", verbose=False), args.jobs
            )
            sweep(plan, args.out, pool, args.data_dir)


if __name__ == "__main__":
    main()
