"""Writes the page that sums up the results of gpu_check.py on a device."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUTCOME = re.compile(
    r"\[gw\d+\] \[ *\d+%\] (?P<a>PASSED|FAILED|ERROR|SKIPPED) (?P<b>tests/.+?)\s*$|"
    r"(?P<c>tests/.+?) (?P<d>PASSED|FAILED|ERROR|SKIPPED).*\[ *\d+%\]$"
)
"""A line of ``pytest -v``, with several workers or one."""


def write_page(folder: Path, title: str) -> None:
    steps = json.loads((folder / "steps.json").read_text())
    lines = [
        f"# {title}",
        "",
        "Written by `python benchmarks/gpu_check.py`, whose docstring says what is measured.",
        *section("Steps", ["| step | end | seconds |", "|---|---|---:|"], rows_of_steps(steps)),
        *section("Tests", [], tests(folder / "suite.txt")),
        *section("Primitives", [], primitives(folder)),
        *section("Training step", BENCH_HEADING, rows_of_bench(folder)),
        *section("Training", TRAIN_HEADING, rows_of_runs(folder)),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def section(title: str, heading: list[str], rows: Iterator[str]) -> list[str]:
    """A section, or nothing if it has no rows."""
    found = [*rows]
    return ["", f"## {title}", "", *heading, *found] if found else []


def rows_of_steps(steps: dict[str, Any]) -> Iterator[str]:
    for name, step in steps.items():
        yield f"| {name} | {step['status']} | {step['seconds']} |"


def tests(file: Path) -> Iterator[str]:
    if not file.exists():
        return
    outcomes: dict[str, str] = {}
    for match in map(OUTCOME.match, file.read_text(errors="replace").splitlines()):
        if match:  # a test that passes and fails to clean up has two lines: the last one counts
            outcomes[match["b"] or match["c"]] = match["a"] or match["d"]
    counts = {kind: [*outcomes.values()].count(kind) for kind in ("PASSED", "SKIPPED")}
    failed = [name for name, kind in outcomes.items() if kind in ("FAILED", "ERROR")]
    yield f"{counts['PASSED']} passed, {counts['SKIPPED']} skipped, {len(failed)} failed."
    for name in failed:
        yield f"- `{name}`"


def primitives(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("primitives-*.txt")):
        yield from ["```", file.read_text(errors="replace").strip(), "```"]


BENCH_HEADING = [
    "Time of KernelNorm's step, its ratios to the steps with BatchNorm and without normalisation",
    "(medians of rounds), and the peak memory beside BatchNorm's.",
    "",
    "| network | batch size | dtype | mode | ms | to BatchNorm | to none | peak MB | BatchNorm's |",
    "|---|---:|---|---|---:|---:|---:|---:|---:|",
]


def rows_of_bench(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("bench-*/bench.json")):
        for result in json.loads(file.read_text())["results"]:
            variants = {variant["norm"]: variant for variant in result["variants"]}
            case = [result[key] for key in ("network", "batch_size", "dtype", "mode")]
            kernel, summary = variants["kernel"], result["summary"].get("kernel")
            cells = [kernel["failure"] or "not measured", *[""] * 4]
            if summary is not None:
                ratios = [summary[key] for key in ("to_batch", "to_none")]
                cells = [f"{1e3 * statistics.median(kernel['seconds']):.2f}"]
                cells += ["" if r is None else f"{r[1]:.2f}" for r in ratios]
                peaks = [variants[norm]["peak_bytes"] for norm in ("kernel", "batch")]
                cells += ["" if peak is None else f"{peak / 1e6:.0f}" for peak in peaks]
            yield f"| {' | '.join(map(str, case + cells))} |"


TRAIN_HEADING = [
    "One run each; the accuracy is the mean over the last five epochs, or over fewer if there are",
    "no more. A run that ran out of time has fewer epochs than it would have.",
    "",
    "| run | epochs | training loss | test accuracy | seconds per epoch |",
    "|---|---:|---:|---:|---:|",
]


def rows_of_runs(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("train/*/metrics.jsonl")):
        history = [json.loads(line) for line in file.read_text().splitlines()]
        if not history:
            continue
        accuracy = statistics.fmean(epoch["test_accuracy"] for epoch in history[-5:])
        seconds = statistics.median(epoch["seconds"] for epoch in history)
        loss = history[-1]["train_loss"]
        cells = (file.parent.name, len(history), f"{loss:.4f}", f"{accuracy:.2%}", f"{seconds:.1f}")
        yield f"| {' | '.join(map(str, cells))} |"
