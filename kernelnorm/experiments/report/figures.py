"""The figures of a section."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from kernelnorm.experiments.recipes import paper
from kernelnorm.experiments.report.reference import paper_accuracy
from kernelnorm.experiments.report.sections import Section
from kernelnorm.experiments.report.statistics import Estimate
from kernelnorm.experiments.report.variants import Variant
from kernelnorm.experiments.style import LABELS, line_style

__all__ = ["Picture", "section_pictures"]

_CURVES_BATCH_SIZE = 32
# Variants are in greys: a colour is a normalisation's.
_DASHES = ("--", "-.", ":")
_GREYS = ("#000000", "#4D4D4D", "#808080", "#A6A6A6")
_MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG, with what has to be said about it.

    Args:
        title: above it.
        alt: what it shows, for those who do not see it.
        note: below it.
        png: the file.
    """

    title: str
    alt: str
    note: str
    png: bytes


def section_pictures(section: Section) -> dict[str, Picture]:
    """Return those figures that there are runs for, by what they are about."""
    makers: dict[str, Callable[[Section], Picture | None]] = {
        "figure-3": _against_batch_size,
        "figure-4": _against_epoch,
        "learning-rates": _against_rate,
        "figure-5": _dropout,
        "ablations": _ablations,
    }
    pictures = {name: make(section) for name, make in makers.items()}
    return {name: picture for name, picture in pictures.items() if picture}


def _against_batch_size(section: Section) -> Picture | None:
    if len({cell.batch_size for cell in section.cells.values() if cell.accuracy}) < 2:
        return None
    case, in_paper = section.config.case, section.config.case in paper()
    alike = in_paper and not section.deviations
    figure = Figure(figsize=(9 if in_paper else 5.5, 4.3), layout="constrained")
    panels = figure.subplots(1, 1 + in_paper, squeeze=False, sharey=alike)[0]
    for norm in section.norms:
        cells = [section.cells[norm, batch_size] for batch_size in section.batch_sizes]
        points = [(cell.batch_size, cell.accuracy) for cell in cells if cell.accuracy]
        panels[0].errorbar(
            [batch_size for batch_size, _ in points],
            [accuracy.mean for _, accuracy in points],
            yerr=[_bar(accuracy) for _, accuracy in points],
            capsize=3,
            **line_style(norm),
        )
    panels[0].set_title("ours")
    if in_paper:
        rows = paper()[case]["accuracy"]["rows"]
        for norm in LABELS:
            values = [(row["batch_size"], *row[norm]) for row in rows if norm in row]
            if values:
                sizes, means, spreads = zip(*values, strict=True)
                style = {**line_style(norm), "linestyle": "--", "alpha": 0.65}
                panels[1].errorbar(sizes, means, yerr=spreads, capsize=3, **style)
        panels[1].set_title("the paper" if alike else "the paper, at its own scale")
    all_sizes = {*section.batch_sizes}
    if in_paper:
        all_sizes |= {row["batch_size"] for row in paper()[case]["accuracy"]["rows"]}
    for panel in panels:
        _batch_size_axis(panel, sorted(all_sizes))
        _tidy(panel)
    panels[0].set_ylabel("test accuracy, %")
    _legend(figure, panels)
    spread = "Bars are sample deviations over seeds."
    beside = " Beside it the paper's Table 1, dashed." if in_paper else ""
    scales = " The two accuracy axes differ." if in_paper and not alike else ""
    return Picture(
        "Figure 3. Accuracy against batch size",
        f"Test accuracy against batch size, {_names(section.norms)}; the numbers are in Table 1.",
        f"{spread}{beside}{scales}",
        _png(figure),
    )


def _against_epoch(section: Section) -> Picture | None:
    sizes = [size for (_, size), cell in section.cells.items() if cell.accuracy]
    if not sizes:
        return None
    size = _nearest(sizes)
    figure = Figure(figsize=(9, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    finals = []
    for norm in section.norms:
        cell, style = section.cells[norm, size], line_style(norm)
        if cell.accuracy is None:
            continue
        done = [record for record in cell.records if record.state == "done"]
        _curves(left, [record.train_losses for record in done], style)
        _curves(right, [record.test_accuracies for record in done], style)
        right.axhline(cell.accuracy.mean, color=style["color"], linestyle="--", linewidth=0.9)
        if theirs := paper_accuracy(section.config.case, norm, size):
            finals.append(f"{LABELS[norm]} {theirs[0]:.2f}")
    left.set_yscale("log")
    left.set_ylabel("training loss")
    right.set_ylabel("test accuracy, % (dashed: final)")
    _epoch_axes((left, right))
    _legend(figure, (left, right))
    note = "One seed of each in full colour, the others pale; dashed the mean final accuracy."
    if finals:
        note += f" The paper's final accuracies, in %: {', '.join(finals)}."
    return Picture(
        f"Figure 4. Training loss and accuracy per epoch, batch size {size}",
        f"Training loss and test accuracy per epoch at batch size {size}, {_names(section.norms)}.",
        note,
        _png(figure),
    )


def _against_rate(section: Section) -> Picture | None:
    tried = [cell for cell in section.cells.values() if len(cell.rates) > 1]
    sizes = sorted({cell.batch_size for cell in tried})
    if not sizes:
        return None
    rows = math.ceil(len(sizes) / 4)
    columns = math.ceil(len(sizes) / rows)
    figure = Figure(figsize=(max(5.5, 2.8 * columns), 0.8 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel, size in zip(panels.flat, sizes, strict=False):
        panel.set_title(f"batch size {size}", fontsize=10)
        panel.set_xscale("log")
        for cell in tried:
            if cell.batch_size != size:
                continue
            style = line_style(cell.norm)
            points = [(rate.lr, rate.tuning) for rate in cell.rates if rate.tuning is not None]
            panel.plot([lr for lr, _ in points], [score for _, score in points], **style)
            best = [(lr, score) for lr, score in points if lr == cell.lr]
            ring = {"marker": "o", "markersize": 13, "fillstyle": "none", "linestyle": "none"}
            panel.plot([lr for lr, _ in best], [y for _, y in best], color=style["color"], **ring)
            lost = [rate.lr for rate in cell.rates if set(rate.states) == {"diverged"}]
            height = 0.04 + 0.05 * section.norms.index(cell.norm)
            panel.plot(
                lost,
                [height] * len(lost),
                transform=panel.get_xaxis_transform(),  # near the lower edge
                **{**style, "label": None, "linestyle": "none", "fillstyle": "none"},
            )
        _tidy(panel)
    for panel in panels.flat[len(sizes) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(0, len(sizes) - columns) : len(sizes)]:  # none below it
        panel.set_xlabel("learning rate")
        panel.tick_params(labelbottom=True)
    figure.supylabel("test accuracy, %", fontsize=10)
    _legend(figure, panels.flat)
    return Picture(
        "Accuracy against learning rate",
        "Final test accuracy against learning rate, a panel for each batch size; the numbers are "
        "in the table of the learning rates.",
        "Of the tuning's seed. A ring is the best rate; hollow marks at the lower edge are rates "
        "whose runs all diverged.",
        _png(figure),
    )


def _dropout(section: Section) -> Picture | None:
    variants = [variant for variant in section.variants if variant.of_dropout and variant.records]
    changed = [variant for variant in variants if variant.name]
    if not changed:
        return None
    size = _nearest([variant.batch_size for variant in changed])
    lrs = [variant.lr for variant in changed if variant.batch_size == size]
    lr = max(lrs, key=lrs.count)
    shown = [v for v in variants if (v.batch_size, v.lr) == (size, lr)]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, variant in enumerate(sorted(shown, key=lambda v: v.name == "")):
        style = _variant_style(number, variant)
        _curves(axes, [record.test_accuracies for record in variant.records], style)
    axes.set_ylabel("test accuracy, %")
    _epoch_axes((axes,))
    _legend(figure, (axes,), columns=2)
    return Picture(
        "Figure 5. The regularising effect of dropout on the statistics",
        "Test accuracy per epoch of kernel networks with and without dropout on the statistics.",
        f"Batch size {size}, learning rate {lr:g}; one seed in full colour, the others pale. The "
        "paper's is ResNet-18 on Imagewoof at 192 pixels, batch size 32, learning rate 0.01, no "
        "augmentation; it prints no numbers to set beside.",
        _png(figure),
    )


def _ablations(section: Section) -> Picture | None:
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
                xerr=[_bar(variant.accuracy)],
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
        _tidy(panel)
    panels[-1, 0].set_xlabel("test accuracy, %")
    return Picture(
        "Ablations of the rules",
        "Final test accuracy of kernel networks with changed rules; the numbers are in "
        "the table of the ablations.",
        "Mean and sample deviation; each seed is a tick.",
        _png(figure),
    )


def _bar(accuracy: Estimate) -> float:
    """Return the length of an error bar; a single run has none, rather than one of no length."""
    return math.nan if accuracy.deviation is None else accuracy.deviation


def _curves(axes: Axes, curves: Sequence[Sequence[float]], style: dict[str, Any]) -> None:
    """Draw a run's curve, and those of its other seeds in a pale colour."""
    for number, curve in enumerate(curves):
        epochs = range(1, len(curve) + 1)
        if number:
            pale = {"color": style["color"], "linestyle": style.get("linestyle", "-")}
            axes.plot(epochs, curve, linewidth=0.8, alpha=0.3, **pale)
        else:
            axes.plot(epochs, curve, **style, markevery=1 + len(curve) // 12, linewidth=1.4)


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


def _nearest(sizes: Sequence[int]) -> int:
    return min(sizes, key=lambda size: abs(math.log(size / _CURVES_BATCH_SIZE)))


def _batch_size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.set_xlabel("batch size")


def _epoch_axes(panels: Sequence[Axes]) -> None:
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _tidy(panel)


def _tidy(axes: Axes) -> None:
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panels: Any, columns: int = 4) -> None:
    """Put one legend below all panels, with each name once."""
    entries: dict[str, Any] = {}
    order = [*LABELS.values()]
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = sorted(entries, key=lambda label: order.index(label) if label in order else 0)
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _names(norms: Sequence[str]) -> str:
    return ", ".join(LABELS[norm] for norm in norms)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    return picture.getvalue()
