"""How the report's figures are drawn: what they have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    "tidy",
]

_CURVES_BATCH_SIZE = 32


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


def bar(accuracy: Estimate) -> float:
    """Return the length of an error bar; a single run has none, rather than one of no length."""
    return math.nan if accuracy.deviation is None else accuracy.deviation


def curves(axes: Axes, curves: Sequence[Sequence[float]], style: dict[str, Any]) -> None:
    """Draw a run's curve, and those of its other seeds in a pale colour."""
    for number, curve in enumerate(curves):
        epochs = range(1, len(curve) + 1)
        if number:
            pale = {"color": style["color"], "linestyle": style.get("linestyle", "-")}
            axes.plot(epochs, curve, linewidth=0.8, alpha=0.3, **pale)
        else:
            axes.plot(epochs, curve, **style, markevery=1 + len(curve) // 12, linewidth=1.4)


def nearest(sizes: Sequence[int]) -> int:
    """Return the batch size nearest to 32, in ratio: that of the paper's curves."""
    return min(sizes, key=lambda size: abs(math.log(size / _CURVES_BATCH_SIZE)))


def batch_size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """Scale the axis by powers of two, with a tick at each batch size."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.set_xlabel("batch size")


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
    """Put one legend below all panels, with each name once, in columns of a width in inches."""
    entries: dict[str, Any] = {}
    order = [*LABELS.values()]
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = sorted(entries, key=lambda label: order.index(label) if label in order else 0)
    handles = [entries[label] for label in labels]
    columns = int(figure.get_figwidth() // width)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
