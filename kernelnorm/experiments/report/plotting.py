"""Functions that all figures of the report share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from kernelnorm.experiments.report.statistics import Estimate
from kernelnorm.experiments.style import LABELS

__all__ = [
    "Picture",
    "bar",
    "batch_size_axis",
    "curves",
    "epoch_axes",
    "legend",
    "nearest",
    "same_span",
    "tidy",
]

_CURVES_BATCH_SIZE = 32


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG, with its texts.

    Args:
        title: the heading.
        alt: the text for readers who do not see the picture.
        note: the caption.
        png: the file's content.
    """

    title: str
    alt: str
    note: str
    png: bytes


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


def nearest(sizes: Sequence[int]) -> int:
    """Return the batch size nearest to 32, in ratio; the paper's curves have batch size 32."""
    return min(sizes, key=lambda size: abs(math.log(size / _CURVES_BATCH_SIZE)))


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
    """Number the epochs."""
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
