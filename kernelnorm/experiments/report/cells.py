"""The cells of the tables: a normalisation at a batch size, its learning rates and seeds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kernelnorm.experiments.report.collect import Record
from kernelnorm.experiments.report.statistics import Estimate, estimate
from kernelnorm.experiments.sweep.tuning import TUNING_SEED, best_rate

__all__ = ["Cell", "Rate", "make_cell"]


@dataclass(frozen=True)
class Rate:
    """A learning rate that was tried; accuracies are in percent.

    Args:
        lr: the learning rate.
        tuning: the accuracy by which the best rate is chosen, ``None`` if no run has it.
        accuracy: mean and deviation over all seeds that are done.
        states: how many runs are in which state.
    """

    lr: float
    tuning: float | None
    accuracy: Estimate | None
    states: dict[str, int]


@dataclass(frozen=True)
class Cell:
    """What a cell shows; accuracies are in percent.

    Args:
        norm: the normalisation.
        batch_size: images a step.
        rates: all learning rates that were tried.
        lr: the best of them, or ``None`` where no run is done.
        records: the runs at the best one that count, the diverged among them.
        accuracies: the final accuracy by seed, of those that are done.
        accuracy: their mean and deviation.
        seconds_per_epoch: the median over their epochs.
        minutes: the median of their whole training times.
    """

    norm: str
    batch_size: int
    rates: list[Rate]
    lr: float | None
    records: list[Record]
    accuracies: dict[int, float]
    accuracy: Estimate | None
    seconds_per_epoch: float | None
    minutes: float | None

    @property
    def diverged(self) -> int:
        """How many of the runs that count have diverged."""
        return sum(record.state == "diverged" for record in self.records)

    @property
    def edge(self) -> str:
        """``"lowest"`` or ``"highest"`` if the best learning rate is at an end of those tried."""
        rates = [rate.lr for rate in self.rates]
        if len(rates) < 2 or self.lr not in (min(rates), max(rates)):
            return ""
        return "lowest" if self.lr == min(rates) else "highest"

    @property
    def absence(self) -> str:
        """Why there is no accuracy."""
        states = Counter[str]()
        for rate in self.rates:
            states.update(rate.states)
        if not states:
            return "no run"
        if set(states) == {"diverged"}:
            rates = len(self.rates)
            return f"diverged at all {rates} learning rates" if rates > 1 else "diverged"
        return next(state for state in ("running", "unfinished", "failed") if states[state])


def make_cell(norm: str, batch_size: int, records: Sequence[Record]) -> Cell:
    """Choose the best learning rate, and the runs that count.

    Seed 0 tunes: the best rate is that with the best final accuracy of seed 0. The other seeds at
    that rate repeat it, and only they count, if any is done; where there was one rate only, nothing
    was tuned, and all count. Without a run of seed 0, the best mean over the seeds tells the rate.

    Args:
        norm: the normalisation.
        batch_size: images a step.
        records: the cell's runs, in any state.
    """
    by_rate = {
        lr: [record for record in records if record.config.lr == lr]
        for lr in sorted({record.config.lr for record in records})
    }
    done = [record for record in records if record.state == "done"]
    tuning = [record for record in done if record.config.seed == TUNING_SEED] or done
    scores = {
        lr: statistics.fmean(scored)
        for lr in by_rate
        if (scored := _accuracies([record for record in tuning if record.config.lr == lr]))
    }
    rates = [
        Rate(
            lr,
            scores.get(lr),
            estimate(_accuracies(there)),
            dict(Counter(record.state for record in there)),
        )
        for lr, there in by_rate.items()
    ]
    lr = best_rate(scores)
    if lr is None:
        return Cell(norm, batch_size, rates, None, [], {}, None, None, None)
    counted = by_rate[lr]
    others = [record for record in counted if record.config.seed != TUNING_SEED]
    if len(by_rate) > 1 and _accuracies(others):
        counted = others
    ended = [record for record in counted if record.state == "done"]
    accuracies = {record.config.seed: record.accuracy for record in ended}
    return Cell(
        norm,
        batch_size,
        rates,
        lr,
        [record for record in counted if record.state in ("done", "diverged")],
        accuracies,
        estimate(list(accuracies.values())),
        statistics.median(seconds for record in ended for seconds in record.seconds),
        statistics.median(sum(record.seconds) / 60 for record in ended),
    )


def _accuracies(records: Sequence[Record]) -> list[float]:
    return [record.accuracy for record in records if record.state == "done"]
