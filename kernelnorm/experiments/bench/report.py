"""The measurements as tables for the screen, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from matplotlib.figure import Figure

from kernelnorm.experiments.bench.plan import WAYS, Column, Plan, Row
from kernelnorm.experiments.bench.results import Quartiles, Result
from kernelnorm.experiments.style import line_style

__all__ = ["WIDTH", "TimeTable", "draw", "memory_lines", "ratio_lines"]

WIDTH = 100
"""The maximum number of columns of a line."""

_MARKERS = dict(zip(WAYS, "^vd", strict=True))


class TimeTable:
    """The ratios to the time of the first base; each row is formatted when it has been measured.

    Args:
        plan: the rows and columns of the table.
    """

    def __init__(self, plan: Plan) -> None:
        self.base, self.columns = plan.bases[0], _base_first(plan.columns, plan.bases[0])
        self.table = _Table([_names(row) for row in plan.rows], [*map(_heading, self.columns)])

    def heading(self) -> str:
        """Return the lines above the first result."""
        return self.table.heading()

    def line(self, result: Result) -> str:
        """Return a result's line, and one for each column that failed."""
        cells = []
        for column in self.columns:
            ratio = None if column == self.base else result.ratio(column, self.base)
            cells.append(str(ratio) if ratio else _milliseconds(result, column))
        return "\n".join([self.table.line(_names(result.row), cells), *_failures(result)])


def ratio_lines(results: Sequence[Result], columns: Sequence[Column], base: Column) -> list[str]:
    """Return the table of ratios to the time of the column ``base``."""
    columns = _base_first(columns, base)
    rows = []
    for result in results:
        if result.best(base):
            cells = [
                _milliseconds(result, base)
                if column == base
                else str(result.ratio(column, base) or "failed")
                for column in columns
            ]
            rows.append((_names(result.row), cells))
    return _lines(rows, columns)


def memory_lines(results: Sequence[Result], columns: Sequence[Column], base: Column) -> list[str]:
    """Return the table of the bytes saved for the backward pass, and of the peak of a step."""
    columns = _base_first(columns, base)
    rows = []
    for result in results:
        for what, name in (("saved_bytes", "saved bytes"), ("peak_bytes", "peak bytes")):
            whole, *sizes = (getattr(result.best(column), what, None) for column in columns)
            if whole:
                ratios = (f"{size / whole:.3f}" if size else "-" for size in sizes)
                rows.append(([*_names(result.row), name], [f"{whole / 1e6:.1f} MB", *ratios]))
    return _lines(rows, columns)


def draw(results: Sequence[Result], columns: Sequence[Column], base: Column) -> Figure:
    """Draw the ratios to ``base``: a point for each other column, with whiskers to the quartiles.

    Columns differ in marker and position as well as in colour.
    """
    others = [column for column in columns if column != base]
    figure = Figure(figsize=(8.0, 1.4 + 0.55 * len(results)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color="black", linewidth=1, label=base.label)
    for i, column in enumerate(others):
        found = [(row, result.ratio(column, base)) for row, result in enumerate(results)]
        points = [(row, ratio) for row, ratio in found if ratio]
        style = {**_style(column), "linestyle": "none", "capsize": 2.5, "markersize": 6}
        axes.errorbar(
            [ratio.median for _, ratio in points],
            [row + 0.7 * ((i + 0.5) / len(others) - 0.5) for row, _ in points],
            xerr=[
                [ratio.median - ratio.low for _, ratio in points],
                [ratio.high - ratio.median for _, ratio in points],
            ],
            **style,
        )
    for row in range(1, len(results)):
        axes.axhline(row - 0.5, color="0.85", linewidth=0.8)
    rows = [_names(result.row) for result in results]
    varying, common = _compare(rows)
    labels = ["\n".join([names[0], ", ".join(names[i] for i in varying if i)]) for names in rows]
    axes.set_yticks(range(len(results)), map(str.strip, labels), fontsize=8)
    axes.set_ylim(len(results) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.1))  # do not magnify differences of a percent
    axes.set_xlabel(f"time of a step, {base.label} = 1 (median and quartiles of the rounds)")
    if common:
        axes.set_title(f"All rows: {', '.join(common)}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    longest = max(len(column.label) for column in columns)
    figure.legend(loc="outside lower center", ncols=max(1, min(5, 110 // (6 + longest))))
    return figure


class _Table:
    """A table of at most :data:`WIDTH` columns.

    The names that all rows share are in its heading. The last of the other names labels the line
    of a row; the names before it are on a line above, where they change.

    Args:
        rows: the names of each row, in the order of the lines.
        columns: the headings of the cells.
    """

    def __init__(self, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
        self.varying, self.common = _compare(rows)
        self.indent = "  " if len(self.varying) > 1 else ""
        self.label_width = max(len(self.indent + row[self.varying[-1]]) for row in rows)
        self.columns = columns
        self.widths = [max(len(column), len("0.00 ±0.00")) for column in columns]
        self.cells = count = len(columns)  # on a line
        room = WIDTH - self.label_width
        if sum(self.widths) + 2 * count > room:
            self.widths = [max(self.widths)] * count
            lines = ceil(count / max(1, room // (2 + self.widths[0])))
            self.cells = ceil(count / lines)
        self.group = ""

    def heading(self) -> str:
        common = [f"All rows: {', '.join(self.common)}."] if self.common else []
        return "\n".join([*common, self._line("", self.columns)])

    def line(self, names: Sequence[str], cells: Sequence[str]) -> str:
        *groups, label = (names[i] for i in self.varying)
        before, self.group = self.group, ", ".join(groups)
        above = [self.group] if self.group != before else []
        return "\n".join([*above, self._line(self.indent + label, cells)])

    def _line(self, label: str, cells: Sequence[str]) -> str:
        aligned = [f"  {c:>{width}}" for c, width in zip(cells, self.widths, strict=True)]
        lines = ["".join(aligned[i : i + self.cells]) for i in range(0, len(cells), self.cells)]
        return label.ljust(self.label_width) + f"\n{'':{self.label_width}}".join(lines)


def _lines(
    rows: Sequence[tuple[Sequence[str], Sequence[str]]], columns: Sequence[Column]
) -> list[str]:
    """Return a table as lines; an empty list if it has no rows."""
    if not rows:
        return []
    table = _Table([names for names, _ in rows], [*map(_heading, columns)])
    return [table.heading(), *(table.line(names, cells) for names, cells in rows)]


def _compare(rows: Sequence[Sequence[str]]) -> tuple[list[int], list[str]]:
    """Return the indices of the names that differ between rows (or ``[0]``), and the others."""
    columns = [*zip(*rows, strict=True)]
    varying = [i for i, column in enumerate(columns) if len({*column}) > 1] or [0]
    return varying, [column[0] for i, column in enumerate(columns) if i not in varying]


def _base_first(columns: Sequence[Column], base: Column) -> list[Column]:
    """Return the columns, the base first; unchanged if the base is a way of private training."""
    if base.way:
        return [*columns]
    return [base, *(column for column in columns if column != base)]


def _heading(column: Column) -> str:
    """Return a column's heading. A way has no norm in it: the column before it shows the norm."""
    return column.way or column.label


def _style(column: Column) -> dict[str, Any]:
    style = {**line_style(column.norm), "label": column.label}
    return style | {"marker": _MARKERS[column.way]} if column.way else style


def _names(row: Row) -> list[str]:
    return [str(row.case), row.dtype, row.mode, row.pass_]


def _milliseconds(result: Result, column: Column) -> str:
    best = result.best(column)
    if best is None:
        return "failed"
    median = 1e3 * Quartiles.of(best.seconds).median
    return f"{median:.0f} ms" if median >= 100 else f"{median:.3g} ms"


def _failures(result: Result) -> list[str]:
    return [
        f"  {variant.column.label}, {variant.memory_format}: {variant.failure}"
        for variant in result.variants
        if variant.failure
    ]
