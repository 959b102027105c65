"""The figures of a section."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from kernelnorm.experiments.recipes import paper
from kernelnorm.experiments.report.plotting import (
    Picture,
    bar,
    batch_size_axis,
    curves,
    epoch_axes,
    legend,
    nearest,
    same_span,
    tidy,
)
from kernelnorm.experiments.report.reference import paper_accuracy
from kernelnorm.experiments.report.sections import Section
from kernelnorm.experiments.report.variant_figures import draw_ablations, draw_dropout
from kernelnorm.experiments.style import (
    LABELS,
    MEAN_LABEL,
    line_style,
    mean_line,
    plain_log,
    png,
)

__all__ = ["section_pictures"]


def section_pictures(section: Section) -> dict[str, Picture]:
    """Return the figures of a section by name; those without runs are left out."""
    makers: dict[str, Callable[[Section], Picture | None]] = {
        "figure-3": _against_batch_size,
        "figure-4": _against_epoch,
        "learning-rates": _against_rate,
        "figure-5": draw_dropout,
        "ablations": draw_ablations,
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
    size = nearest(sizes)
    figure = Figure(figsize=(9, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    finals, drawn = [], []
    for norm in section.norms:
        cell, style = section.cells[norm, size], line_style(norm)
        if cell.accuracy is None:
            continue
        drawn.append(norm)
        done = [record for record in cell.records if record.state == "done"]
        curves(left, [record.train_losses for record in done], style)
        curves(right, [record.test_accuracies for record in done], style)
        mean_line(right, max(len(record.seconds) for record in done), cell.accuracy.mean, style)
        if theirs := paper_accuracy(section.config.case, norm, size):
            finals.append(f"{LABELS[norm]} {theirs[0]:.2f}")
    left.set_yscale("log")
    plain_log(left.yaxis)
    left.set_ylabel("training loss")
    right.set_ylabel(f"test accuracy, %\n({MEAN_LABEL})")
    epoch_axes((left, right))
    legend(figure, (left, right))
    note = "Mean over the seeds; band: from the lowest to the highest seed."
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
            lost = [rate.lr for rate in cell.rates if set(rate.states) == {"diverged"}]
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
    for panel in panels.flat[max(0, len(sizes) - columns) : len(sizes)]:  # none below it
        panel.set_xlabel("learning rate")
        panel.tick_params(labelbottom=True)
    plain_log(panels[0, 0].xaxis)
    figure.supylabel("test accuracy, %", fontsize=10)
    legend(figure, panels.flat)
    return Picture(
        "Accuracy against learning rate",
        "Final test accuracy against learning rate, a panel for each batch size; the numbers are "
        "in the table of the learning rates.",
        "Runs with the tuning seed. A ring marks the best learning rate; hollow marks at the lower "
        "edge are learning rates whose runs all diverged.",
        png(figure),
    )


def _names(norms: Sequence[str]) -> str:
    return ", ".join(LABELS[norm] for norm in norms)
