"""Prints the tables and draws the picture of the study."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelnorm.experiments.plotting import png
from kernelnorm.experiments.statistics import difference, estimate
from kernelnorm.experiments.style import LABELS, line_style
from kernelnorm.experiments.tuning import TUNING_SEED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from study import Run

    Scored = Iterable[tuple[Run, dict[str, Any], float]]
    """Each run with its line of results.jsonl, and its result."""

FIXBN = {"label": "FixBN", "color": "#56B4E9", "marker": "v", "markersize": 5}
TUNED = "dirichlet-0.1"
"""The partition that chooses the learning rates. Its runs have several seeds, and are compared."""
Cell = tuple[str, int, str]
"""Partition, batch size, norm."""
Runs = dict[int, tuple["Run", dict[str, Any], float]]
"""Runs, their lines and results, by seed."""


def repetitions(scored: Scored) -> dict[Cell, Runs]:
    """Return the runs by cell and seed, without those that chose the learning rates."""
    cells: dict[Cell, Runs] = defaultdict(dict)
    for run, entry, score in scored:
        if run.seed != TUNING_SEED:
            cells[run.partition, run.batch_size, run.norm][run.seed] = (run, entry, score)
    return cells


def finished(runs: Runs) -> dict[int, float]:
    """Return the accuracies in percent, by seed, of the runs that have not diverged."""
    return {seed: 100 * score for seed, (_, _, score) in runs.items() if math.isfinite(score)}


def tuning(scored: Scored) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Return the lines of the runs that chose the learning rates, by batch size and norm."""
    found = defaultdict(list)
    for run, entry, _ in scored:
        if run.seed == TUNING_SEED:
            found[run.batch_size, run.norm].append(entry)
    return found


def print_tables(scored: Scored) -> None:
    cells = repetitions(scored)
    print("| clients | batch size | normalisation | accuracy, % | runs | learning rate |")
    print("|---|---|---|---|---|---|")
    for (partition, batch_size, norm), runs in cells.items():
        result = estimate([*finished(runs).values()])
        text = "diverged" if result is None else f"{result.mean:.1f}"
        if result is not None and result.deviation is not None:
            text += f" ± {result.deviation:.1f}"
        lost = len(runs) - len(finished(runs))
        count = f"{len(runs)}, {lost} diverged" if lost else str(len(runs))
        rate = next(iter(runs.values()))[0].rate
        print(f"| {partition} | {batch_size} | {norm} | {text} | {count} | {rate:g} |")
    for (batch_size, norm), entries in tuning(scored).items():
        if all(entry["diverged"] for entry in entries):
            print(f"| all | {batch_size} | {norm} | diverged at every learning rate | | |")
    print(f"\nKernel minus another, clients {TUNED}, 95 % interval of paired seeds:\n")
    for (partition, batch_size, norm), runs in cells.items():
        kernel = cells.get((partition, batch_size, "kernel"))
        if partition != TUNED or norm == "kernel" or kernel is None:
            continue
        paired = difference(finished(kernel), finished(runs))
        if paired is not None:
            interval = "one pair"
            if paired.interval is not None:
                low, high = paired.interval
                interval = f"{low:+.1f} to {high:+.1f}, {paired.pairs} pairs"
            print(f"- batch size {batch_size}, {norm}: {paired.mean:+.1f} ({interval})")


def draw(scored: Scored, file: Path) -> None:
    """Draw accuracy per round: mean over the seeds, and a band of one deviation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    cells = repetitions(scored)
    partitions = [*dict.fromkeys(cell[0] for cell in cells)]
    sizes = sorted({cell[1] for cell in cells})
    figure = Figure(figsize=(3.2 * len(partitions), 2.8 * len(sizes)), layout="constrained")
    grid = figure.subplots(len(sizes), len(partitions), sharex=True, sharey=True, squeeze=False)
    for row, size in zip(grid, sizes, strict=True):
        for axes, partition in zip(row, partitions, strict=True):
            for cell, runs in cells.items():
                if cell[:2] == (partition, size):
                    _draw_lines(axes, cell[2], [entry["accuracy"] for _, entry, _ in runs.values()])
            axes.set_title(f"{partition}, batch size {size}", fontsize="medium")
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for row in grid:
        row[0].set_ylabel("test accuracy, %")
    labels = {text: line for axes in grid.flat for line, text in zip(*_legend(axes), strict=True)}
    figure.legend([*labels.values()], [*labels], loc="outside lower center", ncols=len(labels))
    file.write_bytes(png(figure))
    print(file)


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    lines, labels = axes.get_legend_handles_labels()
    return lines, labels


def _draw_lines(axes: Axes, norm: str, accuracies: list[list[float]]) -> None:
    style = {**(line_style(norm) if norm in LABELS else FIXBN), "markevery": 4}
    columns = [estimate([100 * a for a in column]) for column in zip(*accuracies, strict=False)]
    points = [column for column in columns if column is not None]
    rounds = range(1, len(points) + 1)
    axes.plot(rounds, [point.mean for point in points], **style)
    if any(point.deviation for point in points):
        low, high = (
            [point.mean + sign * (point.deviation or 0) for point in points] for sign in (-1, 1)
        )
        axes.fill_between(rounds, low, high, color=style["color"], alpha=0.15, linewidth=0)
