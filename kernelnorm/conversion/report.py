"""The report of a conversion: a table of layers before and after, with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Report", "Row"]


@dataclass(frozen=True)
class Row:
    """One layer of a converted network.

    Args:
        name: the qualified name of the module
        before: its class before the conversion
        after: its class after the conversion, or the classes of its parts, or ``"removed"``
        why: the reason for it
    """

    name: str
    before: str
    after: str
    why: str


@dataclass(frozen=True)
class Report:
    """What :func:`kernelnorm.convert` did; ``print(report)`` shows it as a table.

    Args:
        rows: the convolutions, the norms to convert, and the activations after KNConvs, in the
            order of the network's modules; then norms that are functions, by the module that calls
            them
        unconverted: the rows of norms that are left, and of convolutions that have a norm but
            could not become KNConvs
        notes: advice that is printed below the table
    """

    rows: Sequence[Row]
    unconverted: Sequence[Row]
    notes: Sequence[str]

    def __str__(self) -> str:
        """The table, a summary and the notes."""
        head = Row("module", "before", "after", "why")
        lines = [(row.name, row.before, row.after, row.why) for row in (head, *self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = [
            "  ".join([*(text.ljust(w) for text, w in zip(line, widths, strict=False)), line[3]])
            for line in lines
        ]
        return "\n".join([*table, "", self.summary, *self.notes])

    @property
    def summary(self) -> str:
        """Count what the layers became, in one line."""
        knconvs = sum("KNConv" in row.after for row in self.rows)
        norms = sum("KernelNorm" in row.after for row in self.rows)
        left = f"{len(self.unconverted)} unconverted" if self.unconverted else "nothing unconverted"
        return f"{knconvs} KNConvs, {norms} KernelNorms, {left}"
