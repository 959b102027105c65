"""The measured times and bytes of a row, and their statistics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from kernelnorm.experiments.bench.plan import Column, Row

__all__ = ["Quartiles", "Result", "Variant"]


class Quartiles(NamedTuple):
    """A quarter of the values is below ``low``, a quarter above ``high``.

    As text it is the median and half the interquartile range.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of two or more values, interpolated between neighbours."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.2f} ±{(self.high - self.low) / 2:.2f}"


@dataclass
class Variant:
    """One column in one memory format.

    Args:
        norm: one of :data:`kernelnorm.norms.NORMS`.
        memory_format: the memory format of the network and its input.
        seconds: the time of a step in each round; the i-th times of all variants share a round.
        saved_bytes: the bytes saved for the backward pass, by :func:`.measure.saved_bytes`;
            ``None`` for inference, for the rows of ``--private``, whose steps store more, and with
            CUDA graphs, which have memory of their own.
        peak_bytes: on CUDA, and on CPUs in the rows of ``--private``, the peak of the memory that a
            step allocates, without weights and momentum; ``None`` with CUDA graphs.
        failure: why there are no times, or an empty string.
        way: as in :class:`.plan.Column`.
    """

    norm: str
    memory_format: str
    seconds: list[float] = field(default_factory=list)
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    failure: str = ""
    way: str = ""

    @property
    def column(self) -> Column:
        """The column of the table."""
        return Column(self.norm, self.way)


@dataclass(frozen=True)
class Result:
    """A row and its variants."""

    row: Row
    variants: Sequence[Variant]

    def best(self, column: Column) -> Variant | None:
        """Return the variant of the column in the memory format with the lowest median time.

        ``None`` if it failed in all formats, or was not measured.
        """
        timed = [v for v in self.variants if v.column == column and v.seconds]
        return min(timed, key=lambda v: statistics.median(v.seconds), default=None)

    def ratio(self, column: Column, to: Column) -> Quartiles | None:
        """Return the quartiles, over the rounds, of the ratio of two columns' times.

        Each is in its faster memory format. ``None`` if either has no times.
        """
        a, b = self.best(column), self.best(to)
        if a is None or b is None:
            return None
        return Quartiles.of([x / y for x, y in zip(a.seconds, b.seconds, strict=True)])

    def as_dict(self, bases: Sequence[Column]) -> dict[str, Any]:
        """Return the result as an object for JSON, with the ratios to each of the bases."""
        summary = {}
        for column in dict.fromkeys(variant.column for variant in self.variants):
            if best := self.best(column):
                summary[str(column)] = {
                    "memory_format": best.memory_format,
                    "seconds": Quartiles.of(best.seconds),
                    **{f"to_{base}": self.ratio(column, base) for base in bases},
                }
        return {
            **asdict(self.row.case),
            "dtype": self.row.dtype,
            "mode": self.row.mode,
            "pass": self.row.pass_,
            "variants": [asdict(variant) for variant in self.variants],
            "summary": summary,
        }
