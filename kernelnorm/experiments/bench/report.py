"""What was measured, as tables for the screen, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from kernelnorm.experiments.bench.plan import Plan, Row
from kernelnorm.experiments.bench.results import Quartiles, Result
from kernelnorm.experiments.style import LABELS, line_style

__all__ = ["TimeTable", "draw", "floor_lines", "memory_lines"]

_HEAD = ("case", "pass", "dtype", "mode")


class TimeTable:
    """The ratios to BatchNorm, line by line as they are measured.

    Args:
        plan: what will be measured.
    """

    def __init__(self, plan: Plan) -> None:
        self.norms = [norm for norm in plan.norms if norm != "batch"]
        self.head = [*_HEAD, "BatchNorm ms", *(LABELS[norm] for norm in self.norms)]
        rows = [_names(row) for row in plan.rows]
        width = len("0.00 (0.00-0.00)")
        self.widths = [
            *(max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)),
            *(max(width, len(heading)) for heading in self.head[4:]),
        ]

    def heading(self) -> str:
        """Return the first line."""
        return _line(self.head, self.widths)

    def line(self, result: Result) -> str:
        """Return a result's line, and one for each norm that failed."""
        batch = result.best("batch")
        cells = [_milliseconds(result, "batch") if batch else "failed"]
        for norm in self.norms:
            ratio = result.ratio(norm, "batch")
            alone = f"{_milliseconds(result, norm)} ms" if result.best(norm) else "failed"
            cells.append(str(ratio) if ratio else alone)
        return "\n".join([_line([*_names(result.row), *cells], self.widths), *_failures(result)])


def floor_lines(results: Sequence[Result], norms: Sequence[str]) -> list[str]:
    """Return the table of ratios to the floor: the network without a normalisation."""
    others = [norm for norm in norms if norm != "none"]
    table = [[*_HEAD, "floor ms", *(LABELS[norm] for norm in others)]]
    for result in results:
        if result.best("none"):
            ratios = (result.ratio(norm, "none") or "failed" for norm in others)
            table.append([*_names(result.row), _milliseconds(result, "none"), *map(str, ratios)])
    return _lines(table)


def memory_lines(results: Sequence[Result], norms: Sequence[str]) -> list[str]:
    """Return the table of the bytes kept for the backward and, on CUDA, of the peak of a step."""
    others = [norm for norm in norms if norm != "batch"]
    table = [[*_HEAD, "memory", "BatchNorm MB", *(LABELS[norm] for norm in others)]]
    for result in results:
        for what, name in (("saved_bytes", "kept"), ("peak_bytes", "peak")):
            sizes = {norm: getattr(result.best(norm), what, None) for norm in norms}
            if whole := sizes["batch"]:
                ratios = (f"{size / whole:.3f}" if (size := sizes[n]) else "-" for n in others)
                table.append([*_names(result.row), name, f"{whole / 1e6:.1f}", *ratios])
    return _lines(table)


def draw(results: Sequence[Result], norms: Sequence[str]) -> Figure:
    """Draw the ratios to BatchNorm: a point for each norm, its whiskers from quartile to quartile.

    Norms differ in marker and place as well as in colour.
    """
    others = [norm for norm in norms if norm != "batch"]
    figure = Figure(figsize=(8.0, 1.6 + 0.75 * len(results)), layout="constrained")
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
    labels = [f"{result.row.case}\n{', '.join(_names(result.row)[1:])}" for result in results]
    axes.set_yticks(range(len(results)), labels, fontsize=8)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlim(left=min(0.5, axes.get_xlim()[0]))
    axes.set_xlabel("time, BatchNorm = 1 (median and quartiles of the rounds)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def _names(row: Row) -> list[str]:
    return [str(row.case), row.pass_, row.dtype, row.mode]


def _milliseconds(result: Result, norm: str) -> str:
    best = result.best(norm)
    assert best is not None
    return f"{1e3 * Quartiles.of(best.seconds).median:.4g}"


def _failures(result: Result) -> list[str]:
    return [
        f"  {LABELS[variant.norm]}, {variant.memory_format}: {variant.failure}"
        for variant in result.variants
        if variant.failure
    ]


def _lines(table: Sequence[Sequence[str]]) -> list[str]:
    """Return a table, or nothing where it has only a heading."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [_line(cells, widths) for cells in table] if len(table) > 1 else []


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(
        cell.ljust(width) if i < len(_HEAD) else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
