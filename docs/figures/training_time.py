"""Draws training_time.png from what ``kernelnorm bench`` wrote to docs/results/bench."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from kernelnorm.experiments.style import LABELS, line_style

BENCH = Path(__file__).parent.parent / "results" / "bench"
NORMS = ("none", "group", "layer", "kernel")


def main() -> None:
    """Write the figure beside this file."""
    results = [
        result
        for name in ("vgg8", "training")
        for result in json.loads((BENCH / f"{name}.json").read_text())["results"]
        if result["pass"] == "train"
    ]
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color=line_style("batch")["color"], linewidth=1.5, label=LABELS["batch"])
    for i, norm in enumerate(NORMS):
        low, median, high = zip(*(r["summary"][norm]["to_batch"] for r in results), strict=True)
        below = [m - lo for lo, m in zip(low, median, strict=True)]
        above = [hi - m for m, hi in zip(median, high, strict=True)]
        places = [column + (i - 1.5) * 0.16 for column in range(len(results))]
        style = {**line_style(norm), "markersize": 8 if norm == "kernel" else 6}
        axes.errorbar(places, median, [below, above], linestyle="none", capsize=2.5, **style)
    labels = [
        f"{r['network']}, {r['image_size']}x{r['image_size']}\nbatch size {r['batch_size']}"
        for r in results
    ]
    axes.set_xticks(range(len(results)), labels, fontsize=8)
    axes.set_ylabel("time, BatchNorm = 1")
    axes.set_title("A training step on two CPU cores (medians and quartiles)", fontsize=10)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(NORMS) + 1, fontsize=9)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
