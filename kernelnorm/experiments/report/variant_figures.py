"""The figures of the ablations."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from kernelnorm.experiments.report.plotting import (
    Picture,
    bar,
    curves,
    epoch_axes,
    legend,
    nearest,
    tidy,
)
from kernelnorm.experiments.report.sections import Section
from kernelnorm.experiments.style import line_style, png

__all__ = ["draw_ablations", "draw_dropout"]

# Variants are in grey: a colour is a normalisation's.
_VARIANT = {"color": "0.25", "marker": "o", "markersize": 5}


def draw_dropout(section: Section) -> Picture | None:
    """Draw the accuracy per epoch: a panel for each dropout, beside the paper's rules."""
    variants = [variant for variant in section.variants if variant.of_dropout and variant.records]
    changed = [variant for variant in variants if variant.name]
    if not changed:
        return None
    size = nearest([variant.batch_size for variant in changed])
    lrs = [variant.lr for variant in changed if variant.batch_size == size]
    lr = max(lrs, key=lrs.count)
    shown = [v for v in variants if (v.batch_size, v.lr) == (size, lr)]
    changed = [variant for variant in shown if variant.name]
    columns = min(3, len(changed))
    rows = math.ceil(len(changed) / columns)
    figure = Figure(figsize=(max(5.5, 3.1 * columns), 0.8 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel, variant in zip(panels.flat, changed, strict=False):
        for other in shown:
            if other.name in ("", variant.name):
                style = _VARIANT if other.name else line_style("kernel")
                label = "dropout as in the title" if other.name else other.label
                values = [record.test_accuracies for record in other.records]
                curves(panel, values, {**style, "label": label})
        panel.set_title(variant.label, fontsize=9)
    epoch_axes([*panels.flat])
    for panel in panels.flat[: len(changed) - columns]:  # another panel is below
        panel.set_xlabel("")
    for panel in panels.flat[max(0, len(changed) - columns) : len(changed)]:
        panel.tick_params(labelbottom=True)
    for panel in panels.flat[len(changed) :]:
        panel.set_axis_off()
    figure.supylabel("test accuracy, %", fontsize=10)
    legend(figure, panels.flat, width=2.7)
    return Picture(
        "Figure 5. The regularising effect of dropout on the statistics",
        "Test accuracy per epoch of kernel networks with and without dropout on the statistics.",
        f"Batch size {size}, learning rate {lr:g}. Mean over the seeds; band: from the lowest to "
        "the highest seed. The paper's figure shows ResNet-18 on Imagewoof at 192 pixels, batch "
        "size 32, learning rate 0.01, no augmentation; the paper prints no numbers for it.",
        png(figure),
    )


def draw_ablations(section: Section) -> Picture | None:
    """Draw the final accuracy of every variant, a panel for each batch size and learning rate."""
    variants = [variant for variant in section.variants if variant.accuracy]
    if not variants:
        return None
    places = sorted({(variant.batch_size, variant.lr) for variant in variants})
    figure = Figure(figsize=(7, 1 + 0.42 * len(variants) + 0.5 * len(places)), layout="constrained")
    heights = [sum((v.batch_size, v.lr) == place for v in variants) + 0.6 for place in places]
    panels = figure.subplots(len(places), 1, squeeze=False, sharex=True, height_ratios=heights)
    style = line_style("kernel")
    for panel, place in zip(panels[:, 0], places, strict=True):
        there = [variant for variant in variants if (variant.batch_size, variant.lr) == place]
        for row, variant in enumerate(there):
            assert variant.accuracy is not None
            seeds = [record.accuracy for record in variant.records]
            panel.plot(seeds, [row] * len(seeds), "|", color="0.4", markersize=9)
            panel.errorbar(
                [variant.accuracy.mean],
                [row],
                xerr=[bar(variant.accuracy)],
                capsize=3,
                color="0.25" if variant.name else style["color"],
                marker="o" if variant.name else style["marker"],
                markersize=6 if variant.name else 10,
            )
            if not variant.name:
                panel.axvline(
                    variant.accuracy.mean, color=style["color"], linewidth=0.8, linestyle=":"
                )
        panel.set_yticks(range(len(there)), [variant.label for variant in there])
        panel.set_ylim(len(there) - 0.5, -0.5)
        panel.set_title(f"batch size {place[0]}, learning rate {place[1]:g}", fontsize=10)
        tidy(panel)
    panels[-1, 0].set_xlabel("test accuracy, %")
    return Picture(
        "Ablations of the rules",
        "Final test accuracy of kernel networks with changed rules; the numbers are in "
        "the table of the ablations.",
        "Mean and sample deviation; each seed is a tick.",
        png(figure),
    )
