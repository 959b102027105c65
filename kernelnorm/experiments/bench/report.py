"""The measurements as tables for the screen, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from kernelnorm.experiments.bench.plan import Plan, Row
from kernelnorm.experiments.bench.results import Quartiles, Result
from kernelnorm.experiments.style import LABELS, line_style

__all__ = ["WIDTH", "TimeTable", "draw", "floor_lines", "memory_lines"]

WIDTH = 100
"""The maximum number of columns of a line."""


class TimeTable:
    """The ratios to BatchNorm's time, line by line as they are measured.

    Args:
        plan: the rows and norms of the table.
    """

    def __init__(self, plan: Plan) -> None:
        self.norms = [norm for norm in plan.norms if norm != "batch"]
        rows = [_names(row) for row in plan.rows]
        self.table = _Table(rows, ["BatchNorm", *(LABELS[norm] for norm in self.norms)])

    def heading(self) -> str:
        """Return the lines above the first result."""
        return self.table.heading()

    def line(self, result: Result) -> str:
        """Return a result's line, and one for each norm that failed."""
        cells = [_milliseconds(result, "batch")]
        for norm in self.norms:
            ratio = result.ratio(norm, "batch")
            cells.append(str(ratio) if ratio else _milliseconds(result, norm))
        return "\n".join([self.table.line(_names(result.row), cells), *_failures(result)])


def floor_lines(results: Sequence[Result], norms: Sequence[str]) -> list[str]:
    """Return the table of ratios to the time of the network without normalisation."""
    others = [norm for norm in norms if norm != "none"]
    rows = []
    for result in results:
        if result.best("none"):
            ratios = (result.ratio(norm, "none") or "failed" for norm in others)
            rows.append((_names(result.row), [_milliseconds(result, "none"), *map(str, ratios)]))
    return _lines(rows, [LABELS["none"], *(LABELS[norm] for norm in others)])


def memory_lines(results: Sequence[Result], norms: Sequence[str]) -> list[str]:
    """Return the table of the bytes saved for the backward and, on CUDA, of the peak of a step."""
    others = [norm for norm in norms if norm != "batch"]
    rows = []
    for result in results:
        for what, name in (("saved_bytes", "saved bytes"), ("peak_bytes", "peak bytes")):
            sizes = {norm: getattr(result.best(norm), what, None) for norm in norms}
            if whole := sizes["batch"]:
                ratios = (f"{size / whole:.3f}" if (size := sizes[n]) else "-" for n in others)
                rows.append(([*_names(result.row), name], [f"{whole / 1e6:.1f} MB", *ratios]))
    return _lines(rows, ["BatchNorm", *(LABELS[norm] for norm in others)])


def draw(results: Sequence[Result], norms: Sequence[str]) -> Figure:
    """Draw the ratios to BatchNorm: a point for each norm, its whiskers from quartile to quartile.

    Norms differ in marker and place as well as in colour.
    """
    others = [norm for norm in norms if norm != "batch"]
    figure = Figure(figsize=(8.0, 1.4 + 0.55 * len(results)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color="black", linewidth=1, label=LABELS["batch"])
    for i, norm in enumerate(others):
        found = [(row, result.ratio(norm, "batch")) for row, result in enumerate(results)]
        points = [(row, ratio) for row, ratio in found if ratio]
        style = {**line_style(norm), "linestyle": "none", "capsize": 2.5, "markersize": 6}
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
    axes.set_xlabel("time of a step, BatchNorm = 1 (median and quartiles of the rounds)")
    if common:
        axes.set_title(f"All rows: {', '.join(common)}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5)
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
        """Return one line, or more lines where the cells do not fit on one."""
        lines = [label.ljust(self.label_width)]
        for cell, width in zip(cells, self.widths, strict=True):
            if len(lines[-1]) + 2 + width > WIDTH:
                lines.append(" " * self.label_width)
            lines[-1] += f"  {cell:>{width}}"
        return "\n".join(lines)


def _lines(
    rows: Sequence[tuple[Sequence[str], Sequence[str]]], columns: Sequence[str]
) -> list[str]:
    """Return a table as lines; an empty list if it has no rows."""
    if not rows:
        return []
    table = _Table([names for names, _ in rows], columns)
    return [table.heading(), *(table.line(names, cells) for names, cells in rows)]


def _compare(rows: Sequence[Sequence[str]]) -> tuple[list[int], list[str]]:
    """Return the places of the names that differ between rows (of one row: 0), and the others."""
    columns = [*zip(*rows, strict=True)]
    varying = [i for i, column in enumerate(columns) if len({*column}) > 1] or [0]
    return varying, [column[0] for i, column in enumerate(columns) if i not in varying]


def _names(row: Row) -> list[str]:
    return [str(row.case), row.dtype, row.mode, row.pass_]


def _milliseconds(result: Result, norm: str) -> str:
    best = result.best(norm)
    if best is None:
        return "failed"
    median = 1e3 * Quartiles.of(best.seconds).median
    return f"{median:.0f} ms" if median >= 100 else f"{median:.3g} ms"


def _failures(result: Result) -> list[str]:
    return [
        f"  {LABELS[variant.norm]}, {variant.memory_format}: {variant.failure}"
        for variant in result.variants
        if variant.failure
    ]
