"""The status of runs, read from their folders alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.runs import Metrics, RunFolder, final_accuracy

__all__ = ["State", "Status", "read_status", "seconds_left", "seconds_per_epoch"]

State = Literal["done", "diverged", "failed", "running", "unfinished", "missing"]
"""``"diverged"`` is a result; failed, unfinished and missing runs still have to be trained."""


@dataclass(frozen=True)
class Status:
    """The status of a run.

    Args:
        config: the run's configuration.
        state: one of :data:`State`.
        history: the metrics of its finished epochs.
        message: why the run has diverged or failed.
    """

    config: RunConfig
    state: State
    history: Sequence[Metrics] = ()
    message: str = ""

    @property
    def result(self) -> float | None:
        """The final accuracy; minus infinity if the run has diverged, ``None`` before its end."""
        if self.state == "diverged":
            return -math.inf
        return final_accuracy(self.history) if self.state == "done" else None

    @property
    def epochs_left(self) -> int:
        """The most epochs that are still to be trained."""
        return 0 if self.result is not None else self.config.epochs - len(self.history)


def read_status(folder: RunFolder, config: RunConfig) -> Status:
    """Read the status of a run.

    Args:
        folder: the run's folder, which need not exist.
        config: the run's configuration.

    Raises:
        RunError: a file is damaged.
    """
    history = folder.read_metrics()
    if config.finished(history):
        return Status(config, "done", history)
    if folder.is_locked():
        return Status(config, "running", history)
    if failure := folder.read_failure():
        state: State = "diverged" if failure["kind"] == "diverged" else "failed"
        return Status(config, state, history, failure["message"])
    return Status(config, "unfinished" if folder.path.exists() else "missing", history)


def seconds_per_epoch(statuses: Sequence[Status], config: RunConfig) -> float | None:
    """Estimate a run's seconds per epoch: the mean over the epochs of runs with the same norm and
    batch size, or else with the same batch size; ``None`` if there are none.
    """
    same = [status for status in statuses if status.config.batch_size == config.batch_size]
    for runs in ([status for status in same if status.config.norm == config.norm], same):
        seconds = [metrics["seconds"] for status in runs for metrics in status.history]
        if seconds:
            return sum(seconds) / len(seconds)
    return None


def seconds_left(statuses: Sequence[Status], of: Sequence[Status]) -> tuple[float, int]:
    """Estimate the time that runs still need one after the other, including their start-up.

    Args:
        statuses: the runs whose measured times are used.
        of: the runs whose remaining time is estimated.

    Returns:
        the seconds, and the number of runs whose time is unknown, which the seconds leave out.
    """
    total, unknown = 0.0, 0
    times: dict[tuple[str, int], float | None] = {}
    starts = [
        sum(metrics.get("startup_seconds", 0.0) for metrics in status.history)
        for status in statuses
        if status.history
    ]
    start = sum(starts) / len(starts) if starts else 0.0
    for status in of:
        config = status.config
        cell = config.norm, config.batch_size
        if cell not in times:
            times[cell] = seconds_per_epoch(statuses, config)
        seconds = times[cell]
        if seconds is not None and status.epochs_left:
            total += seconds * status.epochs_left + start * (not status.history)
        elif status.epochs_left:
            unknown += 1
    return total, unknown
