"""The leaderboard as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kernelnorm.experiments.report.blocks import (
    Entry,
    Table,
    estimate_entry,
    interval_entry,
    number_entry,
    rounded_entry,
)
from kernelnorm.experiments.report.leaderboard import Standing
from kernelnorm.experiments.style import LABELS

__all__ = ["leaderboard_table"]

_HEAD = [
    *("batch size", "rank", "norm", "group", "accuracy, %", "seeds", "last epoch, %"),
    *("KernelNorm minus this norm, %", "epochs to loss", "ms per step", "stored, kB per image"),
    *("batch of 1", "needs"),
]


def leaderboard_table(standings: Sequence[Standing]) -> Table:
    """Return the table of the norms, ranked batch size by batch size."""
    rows = [
        [
            number_entry(standing.batch_size),
            Entry("-") if standing.rank is None else number_entry(standing.rank),
            Entry(LABELS[standing.norm]),
            Entry(standing.group),
            estimate_entry(standing.accuracy) if standing.accuracy else Entry(standing.absence),
            _seeds(standing),
            Entry("-") if standing.last is None else Entry(f"{standing.last:.2f}", standing.last),
            _interval(standing),
            rounded_entry(standing.epochs),
            rounded_entry(standing.seconds_per_step, 1000),
            rounded_entry(standing.saved_bytes, 1e-3),
            Entry("yes" if standing.batch_one else "no"),
            Entry(", ".join(standing.needs).upper()),
        ]
        for standing in standings
    ]
    return Table("Leaderboard", _HEAD, rows, _note(standings))


def _seeds(standing: Standing) -> Entry:
    if standing.accuracy is None:
        return Entry("-")
    lost = f", {standing.diverged} diverged" * bool(standing.diverged)
    return Entry(f"{standing.accuracy.runs}{lost}", standing.accuracy.runs)


def _interval(standing: Standing) -> Entry:
    """Return the interval, with the number of pairs if there are fewer than the norm has seeds."""
    found, accuracy = standing.to_kernel, standing.accuracy
    if found is None or accuracy is None:
        return Entry("-")
    entry = interval_entry(found)
    if found.interval is None or found.pairs >= accuracy.runs + standing.diverged:
        return entry
    return replace(entry, text=f"{entry.text} ({found.pairs} pairs)")


def _note(standings: Sequence[Standing]) -> str:
    losses = {standing.batch_size: standing.loss for standing in standings}
    shown = [f"{loss:g} at batch size {size}" for size, loss in losses.items() if loss is not None]
    epochs = (
        f"Epochs: to a training loss of {', '.join(shown)}, median over seeds; this is the lowest "
        "loss that all seeds of the three most accurate norms reach, rounded up, and a dash marks "
        "norms that do not reach it. "
    )
    return (
        "Ranked by mean final accuracy, as in Table 1; norms with a diverged seed come last. "
        "KernelNorm minus this norm: Student's 95 % interval of the difference of accuracies, "
        "paired by seed, with the number of pairs if seeds are left out because they diverged or "
        "have no run; between equal norms, one in twenty intervals excludes zero by chance. "
        f"{epochs if shown else ''}Time: median over epochs and runs, "
        "without the first steps; longer if other work ran on the machine. No times are shown if "
        "the runs differ in device, number of threads or compilation. Stored: kilobytes for the "
        "backward pass per image of the batch, of the same network in float32 on a CPU; a dash "
        "where that is unknown, as in private training. Time and bytes depend on the "
        "implementation: KernelNorm has kernels of its own, while some norms are made of "
        "elementary operations. Batch of 1: whether the norm is meant for training with one image "
        "per batch. AGC: adaptive gradient clipping."
    )
