"""Accuracy against privacy on CIFAR-10: a study.

    python benchmarks/private_cifar10.py run --data-dir data      trains the missing runs
    python benchmarks/private_cifar10.py dry-run                  lists the runs
    python benchmarks/private_cifar10.py table                    prints the accuracies
    python benchmarks/private_cifar10.py picture private.png      draws the accuracies

For each norm and budget, seed 0 searches the learning rate, as ``kernelnorm reproduce`` does. For
kernel, group and ws_group, seeds 1 to 3 repeat the best rate. You can stop the study at any time;
run the same command again to resume.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.files import write_atomically
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.plotting import bar, legend, png, tidy
from kernelnorm.experiments.private_options import Privacy
from kernelnorm.experiments.recipes import RECIPES
from kernelnorm.experiments.runs import RunFolder, final_accuracy
from kernelnorm.experiments.statistics import difference, estimate
from kernelnorm.experiments.style import LABELS, line_style
from kernelnorm.experiments.sweep import LocalPool, dry_run, make_grid, sweep
from kernelnorm.experiments.sweep.plan import Tuned
from kernelnorm.experiments.tuning import TUNING_SEED, best_rate

STAGES = (
    *((epsilon, ("kernel", "group", "ws_group"), (1, 2, 3)) for epsilon in (3.0, 1.0, 8.0)),
    *((epsilon, ("layer", "none"), ()) for epsilon in (3.0, 1.0, 8.0)),
)
"""Budgets, norms and seeds of the repetitions, in the order in which they are trained."""
STANDARDISED = (
    *((epsilon, ("group",), (1, 2, 3)) for epsilon in (3.0, 1.0, 8.0)),
    (3.0, ("ws_group",), (1, 2, 3)),
)
"""The stages with ``--standardise``."""
RATES = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)
CHOICES: dict[str, Any] = {
    "batch_sizes": [1024],
    "epochs": 10,
    "schedule": "cosine",
    "model_options": {"width": 0.25},
    "image_size": 16,
}
NOTE = "VGG8 of a quarter of the width, images of 16 pixels, 10 epochs: small, for a CPU."

Results = dict[tuple[str, float], dict[int, float]]
"""Final accuracies in percent, by norm and budget, and by seed."""


def stage(
    epsilon: float, norms: tuple[str, ...], seeds: tuple[int, ...], *, standardise: bool
) -> Tuned:
    """Return the runs of a stage."""
    private = Privacy(epsilon=epsilon, micro_batch_size=256)
    recipe = RECIPES["cifar10-vgg8"]
    cells = make_grid(
        recipe, norms=norms, lrs=[0.5], private=private, standardise=standardise, **CHOICES
    )
    return Tuned(cells, RATES, seeds, note=NOTE)


def read(out: Path) -> Results:
    """Return the accuracies at the best rate; the tuning seed counts if there is no other."""
    found: defaultdict[tuple[str, float], dict[tuple[float, int], float]] = defaultdict(dict)
    for path in sorted(out.glob("*/config.yaml")):
        folder = RunFolder(path.parent)
        config, history = RunConfig.from_dict(folder.read_config()["run"]), folder.read_metrics()
        if config.private is not None and config.finished(history):
            accuracy = 100 * final_accuracy(history)
            found[config.norm, config.private.epsilon][config.lr, config.seed] = accuracy
    results: Results = {}
    for cell, runs in found.items():
        tuning = {lr: accuracy for (lr, seed), accuracy in runs.items() if seed == TUNING_SEED}
        best = best_rate(tuning)
        seeds = {seed: accuracy for (lr, seed), accuracy in runs.items() if lr == best}
        if len(seeds) > 1:
            del seeds[TUNING_SEED]
        results[cell] = seeds
    return results


def cells_of(results: Results) -> tuple[list[str], list[float]]:
    """Return the norms, in the order of legends, and the budgets."""
    norms = [norm for norm in LABELS if any(norm == cell[0] for cell in results)]
    return norms, sorted({epsilon for _, epsilon in results})


def print_table(title: str, results: Results, kernel: Results) -> None:
    """Print mean and deviation of each norm, and the paired differences of kernel and others.

    Args:
        title: the title of the first column.
        results: the runs of the table.
        kernel: the runs of the kernel network, which standardises its input itself.
    """
    norms, budgets = cells_of(results)
    print(f"| {title} |" + "".join(f" ε = {epsilon:g} |" for epsilon in budgets))
    print("|---|" + "---:|" * len(budgets))
    for norm in norms:
        cells = [estimate([*results.get((norm, epsilon), {}).values()]) for epsilon in budgets]
        texts = [
            "-" if x is None else f"{x.mean:.2f}" + (f" ± {x.deviation:.2f}" if x.deviation else "")
            for x in cells
        ]
        print(f"| {LABELS[norm]} |" + "".join(f" {text} |" for text in texts))
    for norm in ("group", "ws_group"):
        texts = []
        for epsilon in budgets:
            ours, theirs = kernel.get(("kernel", epsilon), {}), results.get((norm, epsilon), {})
            found = difference(ours, theirs)
            interval = found and found.interval
            low_high = f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else ""
            texts.append("-" if found is None else f"{found.mean:+.2f}{low_high}")
        print(f"| KernelNorm − {LABELS[norm]} |" + "".join(f" {text} |" for text in texts))


def draw(results: Results, standardised: Results) -> Figure:
    """Draw accuracy against budget: a curve for each norm, and for standardised GroupNorm."""
    norms, budgets = cells_of(results)
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    fair = {**line_style("group"), "label": "GroupNorm, standardised", "linestyle": ":"}
    curves = [(results, norm, line_style(norm)) for norm in norms] + [(standardised, "group", fair)]
    for cells, norm, style in curves:
        found = {e: estimate([*cells[norm, e].values()]) for e in budgets if (norm, e) in cells}
        known = {epsilon: x for epsilon, x in found.items() if x is not None}
        axes.errorbar(
            [*known],
            [x.mean for x in known.values()],
            yerr=[bar(x) for x in known.values()],
            capsize=3,
            **style,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{epsilon:g}" for epsilon in budgets])
    axes.set_xlabel("privacy budget ε, δ = 1e-5")
    axes.set_ylabel("test accuracy, %")
    tidy(axes)
    legend(figure, [axes])
    return figure


def main() -> None:
    """Run or list the stages one after the other, or print or draw their results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["run", "dry-run", "table", "picture"])
    parser.add_argument("file", type=Path, nargs="?", default=Path("private.png"), help="PNG file")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/private-cifar10"))
    parser.add_argument(
        "--standardise",
        action="store_true",
        help="train GroupNorm, and WS + GroupNorm at epsilon 3, on pixels minus 0.5, divided by\n"
        "0.25: KernelNorm standardises by itself. Give --out runs/private-cifar10/standardised,\n"
        "where table and picture look for these runs",
    )
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs (default: 2)")
    args = parser.parse_args()
    if args.what in ("table", "picture"):
        results, standardised = read(args.out), read(args.out / "standardised")
        if args.what == "picture":
            write_atomically(args.file, png(draw(results, standardised)))
            return
        if standardised:
            print_table("norm, images standardised", standardised, results)
            print()
        print_table("norm, pixels from 0 to 1", results, results)
        return
    for options in STANDARDISED if args.standardise else STAGES:
        plan = stage(*options, standardise=args.standardise)
        if args.what == "dry-run":
            dry_run(plan, args.out, args.jobs)
        else:
            launch = Launch(data_dir=args.data_dir, accelerator="cpu", verbose=False)
            sweep(plan, args.out, LocalPool(launch, args.jobs), args.data_dir)


if __name__ == "__main__":
    main()
