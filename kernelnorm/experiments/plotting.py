"""Functions that all figures share: curves, axes, legends, PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

from kernelnorm.experiments.statistics import Estimate
from kernelnorm.experiments.style import LABELS

__all__ = [
    "MEAN_LABEL",
    "bar",
    "batch_size_axis",
    "curves",
    "epoch_axes",
    "legend",
    "mean_line",
    "plain_log",
    "png",
    "same_span",
    "tidy",
]

MEAN_LABEL = "dashed: mean of the last five epochs"


def bar(accuracy: Estimate) -> float:
    """Return the length of an error bar; NaN for a single run, which has none."""
    return math.nan if accuracy.deviation is None else accuracy.deviation


def curves(axes: Axes, curves: Sequence[Sequence[float]], style: dict[str, Any]) -> None:
    """Draw the mean of the curves of all seeds, and a band from the lowest to the highest.

    Curves of different lengths are drawn up to the end of the shortest.
    """
    values = [*zip(*curves, strict=False)]
    epochs = range(1, len(values) + 1)
    means = [fmean(seeds) for seeds in values]
    axes.plot(epochs, means, **style, markevery=1 + len(values) // 12, linewidth=1.4)
    if len(curves) > 1:
        lowest, highest = [*map(min, values)], [*map(max, values)]
        axes.fill_between(epochs, lowest, highest, color=style["color"], alpha=0.18, linewidth=0)


def batch_size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """Scale the axis by powers of two, with a tick at each batch size."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.set_xlabel("batch size")


def same_span(panels: Sequence[Axes]) -> None:
    """Give all vertical axes the same length in percentage points, each around its own values."""
    limits = [panel.get_ylim() for panel in panels]
    span = max(high - low for low, high in limits)
    for panel, (low, high) in zip(panels, limits, strict=True):
        top = min((low + high + span) / 2, max(high, 100))
        panel.set_ylim(top - span, top)


def epoch_axes(panels: Sequence[Axes]) -> None:
    """Label the horizontal axes with whole epochs, and tidy the panels."""
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        tidy(panel)


def tidy(axes: Axes) -> None:
    """Draw a pale grid, and no frame."""
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, panels: Iterable[Axes], width: float = 2.0) -> None:
    """Put one legend below all panels, with columns of ``width`` inches; it has each name once."""
    entries: dict[str, Any] = {}
    order = [*LABELS.values()]
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = sorted(entries, key=lambda label: order.index(label) if label in order else 0)
    handles = [entries[label] for label in labels]
    columns = int(figure.get_figwidth() // width)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def mean_line(axes: Axes, epochs: int, mean: float, style: dict[str, Any]) -> None:
    """Draw ``mean``, of the last five of ``epochs`` epochs, as a dashed line over these five."""
    ends = (max(1, epochs - 4) - 0.3, epochs + 0.3)
    axes.plot(ends, (mean, mean), color=style["color"], linestyle="--", linewidth=1.2)


def plain_log(axis: Axis) -> None:
    """Label a logarithmic axis with plain decimals such as 0.5, 1, 2; call it after plotting."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high / low < 30 else (1, 3) if high / low < 300 else (1,)
    even = MaxNLocator(5, steps=[1, 2, 5, 10])
    axis.set_major_locator(even if high / low < 5 else LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.9f}".rstrip("0").rstrip(".")))


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    return picture.getvalue()
