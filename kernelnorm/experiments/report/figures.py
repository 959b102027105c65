"""The figures of a section."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from kernelnorm.experiments.paper import paper, paper_accuracy
from kernelnorm.experiments.plotting import (
    MEAN_LABEL,
    bar,
    batch_size_axis,
    curves,
    epoch_axes,
    legend,
    mean_line,
    plain_log,
    png,
    same_span,
    tidy,
)
from kernelnorm.experiments.report.blocks import Picture
from kernelnorm.experiments.report.sections import Section
from kernelnorm.experiments.style import LABELS, line_style

__all__ = ["section_pictures"]

_CURVES_BATCH_SIZE = 32

# Variants are grey, because a colour stands for a normalisation.
_VARIANT = {"color": "0.25", "marker": "o", "markersize": 5}


def section_pictures(section: Section) -> dict[str, Picture]:
    """Return the figures of a section by name; figures without data are left out."""
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
            yerr=[bar(accuracy) for _, accuracy in points],
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
        panels[1].set_title("the paper")
    all_sizes = {*section.batch_sizes}
    if in_paper:
        all_sizes |= {row["batch_size"] for row in paper()[case]["accuracy"]["rows"]}
    for panel in panels:
        batch_size_axis(panel, sorted(all_sizes))
        tidy(panel)
    if not alike:
        same_span(panels)
    panels[0].set_ylabel("test accuracy, %")
    legend(figure, panels)
    spread = "Error bars are sample deviations over seeds."
    beside = " Dashed: the paper's Table 1." if in_paper else ""
    scales = " Both vertical axes span the same number of points." if in_paper and not alike else ""
    return Picture(
        "Figure 3. Accuracy against batch size",
        f"Test accuracy against batch size, {_names(section.norms)}; the numbers are in Table 1.",
        f"{spread}{beside}{scales}",
        png(figure),
    )


def _against_epoch(section: Section) -> Picture | None:
    sizes = [size for (_, size), cell in section.cells.items() if cell.accuracy]
    if not sizes:
        return None
    size = _nearest(sizes)
    figure = Figure(figsize=(9, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    finals, drawn, unequal = [], [], False
    for norm in section.norms:
        cell, style = section.cells[norm, size], line_style(norm)
        if cell.accuracy is None:
            continue
        drawn.append(norm)
        done = [record for record in cell.records if record.state == "done"]
        curves(left, [record.train_losses for record in done], style)
        curves(right, [record.test_accuracies for record in done], style)
        ends = {len(record.seconds) for record in done}
        unequal = unequal or len(ends) > 1
        mean_line(right, min(ends), cell.accuracy.mean, style)
        if theirs := paper_accuracy(section.config.case, norm, size):
            finals.append(f"{LABELS[norm]} {theirs[0]:.2f}")
    left.set_yscale("log")
    plain_log(left.yaxis)
    left.set_ylabel("training loss")
    right.set_ylabel(f"test accuracy, %\n({MEAN_LABEL})")
    epoch_axes((left, right))
    legend(figure, (left, right))
    note = "Mean over the seeds; band: from the lowest to the highest seed."
    if unequal:
        note += (
            " A curve ends with its shortest seed. The dashed line is drawn there, at the mean "
            "over the last five epochs of each seed."
        )
    if finals:
        note += f" The paper's final accuracies, in %: {', '.join(finals)}."
    return Picture(
        f"Figure 4. Training loss and accuracy per epoch, batch size {size}",
        f"Training loss and test accuracy per epoch at batch size {size}, {_names(drawn)}.",
        note,
        png(figure),
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
        panel.margins(x=0.12)  # space between the tick labels of neighbouring panels
        for cell in tried:
            if cell.batch_size != size:
                continue
            style = line_style(cell.norm)
            points = [(rate.lr, rate.tuning) for rate in cell.rates if rate.tuning is not None]
            panel.plot([lr for lr, _ in points], [score for _, score in points], **style)
            best = [(lr, score) for lr, score in points if lr == cell.lr]
            ring = {"marker": "o", "markersize": 13, "fillstyle": "none", "linestyle": "none"}
            panel.plot([lr for lr, _ in best], [y for _, y in best], color=style["color"], **ring)
            lost = [r.lr for r in cell.rates if r.tuning is None and r.states.get("diverged")]
            height = 0.04 + 0.05 * section.norms.index(cell.norm)
            panel.plot(
                lost,
                [height] * len(lost),
                transform=panel.get_xaxis_transform(),  # near the lower edge
                **{**style, "label": None, "linestyle": "none", "fillstyle": "none"},
            )
        tidy(panel)
    for panel in panels.flat[len(sizes) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(0, len(sizes) - columns) : len(sizes)]:  # no panel is below
        panel.set_xlabel("learning rate")
        panel.tick_params(labelbottom=True)
    plain_log(panels[0, 0].xaxis)
    figure.supylabel("test accuracy, %", fontsize=10)
    legend(figure, panels.flat)
    return Picture(
        "Accuracy against learning rate",
        "Final test accuracy against learning rate, a panel for each batch size; the numbers are "
        "in the table of the learning rates.",
        "The accuracy of seed 0, which chooses the learning rate; the mean over all seeds if seed "
        "0 has no result at a rate. A ring marks the best rate; hollow marks at the lower edge are "
        "rates at which training diverged.",
        png(figure),
    )


def _dropout(section: Section) -> Picture | None:
    """Draw test accuracy per epoch: a panel for each changed dropout, with the paper's rules."""
    variants = [variant for variant in section.variants if variant.of_dropout and variant.records]
    changed = [variant for variant in variants if variant.name]
    if not changed:
        return None
    size = _nearest([variant.batch_size for variant in changed])
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


def _ablations(section: Section) -> Picture | None:
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


def _nearest(sizes: Sequence[int]) -> int:
    """Return the batch size nearest to 32, in ratio; the paper's curves have batch size 32."""
    return min(sizes, key=lambda size: abs(math.log(size / _CURVES_BATCH_SIZE)))


def _names(norms: Sequence[str]) -> str:
    return ", ".join(LABELS[norm] for norm in norms)
