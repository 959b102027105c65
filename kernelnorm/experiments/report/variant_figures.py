"""The figures of the ablations."""

from __future__ import annotations

from typing import Any

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
from kernelnorm.experiments.report.variants import Variant
from kernelnorm.experiments.style import line_style, png

__all__ = ["draw_ablations", "draw_dropout"]

# Variants are in greys: a colour is a normalisation's.
_DASHES = ("--", "-.", ":")
_GREYS = ("#000000", "#4D4D4D", "#808080", "#A6A6A6")
_MARKERS = ("o", "s", "^", "D", "v")


def draw_dropout(section: Section) -> Picture | None:
    """Draw the accuracy per epoch with and without dropout on the statistics."""
    variants = [variant for variant in section.variants if variant.of_dropout and variant.records]
    changed = [variant for variant in variants if variant.name]
    if not changed:
        return None
    size = nearest([variant.batch_size for variant in changed])
    lrs = [variant.lr for variant in changed if variant.batch_size == size]
    lr = max(lrs, key=lrs.count)
    shown = [v for v in variants if (v.batch_size, v.lr) == (size, lr)]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, variant in enumerate(sorted(shown, key=lambda v: v.name == "")):
        style = _variant_style(number, variant)
        curves(axes, [record.test_accuracies for record in variant.records], style)
    axes.set_ylabel("test accuracy, %")
    epoch_axes((axes,))
    legend(figure, (axes,), width=3.5)
    return Picture(
        "Figure 5. The regularising effect of dropout on the statistics",
        "Test accuracy per epoch of kernel networks with and without dropout on the statistics.",
        f"Batch size {size}, learning rate {lr:g}; one seed in full colour, the others pale. The "
        "paper's is ResNet-18 on Imagewoof at 192 pixels, batch size 32, learning rate 0.01, no "
        "augmentation; it prints no numbers to set beside.",
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


def _variant_style(number: int, variant: Variant) -> dict[str, Any]:
    """Return grey, dashes and marker; the paper's rules have KernelNorm's own."""
    if not variant.name:
        return {**line_style("kernel"), "label": variant.label}
    return {
        "label": variant.label,
        "color": _GREYS[number % len(_GREYS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "markersize": 5,
    }
