"""Results of the bench, made by hand."""

from __future__ import annotations

from typing import Any

from kernelnorm.experiments.bench.plan import Case, Column, Plan, Row
from kernelnorm.experiments.bench.results import Result, Variant

ROW = Row(Case("vgg8", 8, 2), "float32", "eager", "train")
TINY: dict[str, Any] = {
    "networks": ["vgg8"],
    "sizes": [8],
    "batch_sizes": [2],
    "device": "cpu",
    "rounds": 2,
}
KERNEL, GROUP = Column("kernel"), Column("group")


def result(*variants: Variant) -> Result:
    return Result(ROW, variants)


def words(line: str) -> str:
    return " ".join(line.split())


def hand_made() -> Result:
    return result(
        Variant("none", "channels_last", [1.0, 1.0, 1.0], saved_bytes=50),
        Variant("batch", "channels_last", [2.0, 4.0, 2.0], saved_bytes=100),
        Variant("batch", "contiguous", [3.0, 5.0, 3.0], saved_bytes=200),
        Variant("kernel", "channels_last", [9.0, 9.0, 9.0], saved_bytes=60),
        Variant("kernel", "contiguous", [3.0, 4.0, 4.0], saved_bytes=70),
        Variant("group", "channels_last", failure="failed: OutOfMemoryError: no more"),
    )


def measured(plan: Plan) -> list[Result]:
    """Every variant of a plan took 1.5 ms."""
    return [
        Result(
            row,
            [Variant(c.norm, "channels_last", [0.0015] * 3, 10, way=c.way) for c in plan.columns],
        )
        for row in plan.rows
    ]
