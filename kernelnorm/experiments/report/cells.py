"""Means over seeds: for cells of the tables, and for variants of the paper's rules."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kernelnorm.experiments.report.collect import Record
from kernelnorm.experiments.statistics import Difference, Estimate, difference, estimate
from kernelnorm.experiments.tuning import TUNING_SEED, best_rate

__all__ = ["Cell", "Rate", "Variant", "make_cell", "make_variants"]


@dataclass(frozen=True)
class Rate:
    """A learning rate that was tried; accuracies are in percent.

    Args:
        lr: the learning rate.
        tuning: the accuracy by which the best rate is chosen, see :func:`make_cell`; ``None`` if
            there is none, or if a run that chooses has diverged.
        accuracy: mean and deviation over all seeds that are done.
        states: the number of runs in each state.
    """

    lr: float
    tuning: float | None
    accuracy: Estimate | None
    states: dict[str, int]


@dataclass(frozen=True)
class Cell:
    """A normalisation at one batch size; accuracies are in percent.

    Args:
        norm: the normalisation.
        batch_size: images per step.
        rates: all learning rates that were tried.
        lr: the best of these rates; ``None`` if there is none.
        reported_chose: several rates were tried, and seed 0 has no result at one of them, so that
            all seeds have chosen the rate, including those that are reported.
        records: the runs at the best rate that count, including diverged ones.
        accuracies: the final accuracy by seed, for the records that are done.
        accuracy: mean and deviation of ``accuracies``.
        seconds_per_epoch: median training time over all epochs of the records that are done.
        minutes: median training time of the records that are done.
    """

    norm: str
    batch_size: int
    rates: list[Rate]
    lr: float | None
    reported_chose: bool
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
        """``"lowest"`` or ``"highest"`` if the best rate is at an end of those tried, or empty."""
        rates = [rate.lr for rate in self.rates]
        if len(rates) < 2 or self.lr not in (min(rates), max(rates)):
            return ""
        return "lowest" if self.lr == min(rates) else "highest"

    @property
    def absence(self) -> str:
        """Why there is no accuracy."""
        if self.diverged:
            return f"{self.diverged} repetition{'s' * (self.diverged > 1)} diverged"
        states = Counter[str]()
        for rate in self.rates:
            states.update(rate.states)
        if not states:
            return "no run"
        if set(states) <= {"diverged", "done"}:
            rates = len(self.rates)
            return f"diverged at all {rates} learning rates" if rates > 1 else "diverged"
        there = (state for state in ("running", "unfinished", "failed") if states[state])
        return next(there, "unfinished")


def make_cell(norm: str, batch_size: int, records: Sequence[Record]) -> Cell:
    """Choose the best learning rate, and the runs that count.

    The best rate has the highest final accuracy of seed 0; a rate at which seed 0 has diverged is
    never the best. If seed 0 has no result at some rate at which other seeds have one, the best
    rate has the highest mean over all seeds, of which none has diverged. A single rate is the best
    if a run is done.

    If several rates were tried, seed 0 is left out at the best rate as soon as another seed is done
    or diverged. If one rate was tried, nothing was tuned, and all seeds count.

    Args:
        norm: the normalisation.
        batch_size: images per step.
        records: the cell's runs, in any state.
    """
    by_rate = {
        lr: [record for record in records if record.config.lr == lr]
        for lr in sorted({record.config.lr for record in records})
    }
    tuning, reported_chose = _tuning_runs(records)
    results = {
        lr: [_result(record) for record in tuning if record.config.lr == lr] for lr in by_rate
    }
    scores = {lr: statistics.fmean(found) for lr, found in results.items() if found}
    rates = [
        Rate(
            lr,
            scores[lr] if scores.get(lr, -math.inf) > -math.inf else None,
            estimate(_accuracies(there)),
            dict(Counter(record.state for record in there)),
        )
        for lr, there in by_rate.items()
    ]
    lr = best_rate(scores)
    if len(by_rate) == 1 and any(record.state == "done" for record in records):
        lr = next(iter(by_rate))
    if lr is None:
        return Cell(norm, batch_size, rates, None, False, [], {}, None, None, None)
    counted = by_rate[lr]
    others = [record for record in counted if record.config.seed != TUNING_SEED]
    if len(by_rate) > 1 and any(record.state in ("done", "diverged") for record in others):
        counted = others
    ended = [record for record in counted if record.state == "done"]
    accuracies = {record.config.seed: record.accuracy for record in ended}
    return Cell(
        norm,
        batch_size,
        rates,
        lr,
        reported_chose,
        [record for record in counted if record.state in ("done", "diverged")],
        accuracies,
        estimate(list(accuracies.values())),
        _median([seconds for record in ended for seconds in record.seconds]),
        _median([sum(record.seconds) / 60 for record in ended]),
    )


def _tuning_runs(records: Sequence[Record]) -> tuple[list[Record], bool]:
    """Return the runs that choose the rate, and whether they are of all seeds."""
    ended = [record for record in records if record.state in ("done", "diverged")]
    tuning = [record for record in ended if record.config.seed == TUNING_SEED]
    rates = {record.config.lr for record in ended}
    if {record.config.lr for record in tuning} == rates:
        return tuning, False
    return ended, len(rates) > 1


def _result(record: Record) -> float:
    return -math.inf if record.state == "diverged" else record.accuracy


@dataclass(frozen=True)
class Variant:
    """One variant at one batch size and learning rate; accuracies are in percent.

    Args:
        name: its changes of the paper's rules, see :attr:`RunConfig.variant`; empty: none.
        batch_size: images per step.
        lr: the learning rate.
        states: the number of runs in each state.
        records: the runs that are done.
        accuracy: the mean and deviation of their final accuracies.
        to_paper: the difference to the paper's rules, paired by seed; ``None`` without a pair, and
            for the paper's rules themselves.
    """

    name: str
    batch_size: int
    lr: float
    states: dict[str, int]
    records: list[Record]
    accuracy: Estimate | None
    to_paper: Difference | None

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        return self.name or "the paper's rules"

    @property
    def of_dropout(self) -> bool:
        """Tell whether the variant changes only dropout on the statistics, or nothing."""
        changed = [part.split("=")[0] for part in self.name.split(", ") if part]
        return set(changed) <= {"dropout_p", "head_dropout_p"}


def make_variants(records: Sequence[Record]) -> list[Variant]:
    """Return the variants, at batch sizes and learning rates with other rules than the paper's.

    Args:
        records: the runs of a section; those of other norms than ``kernel`` are ignored.
    """
    groups: dict[tuple[int, float], dict[str, list[Record]]] = {}
    for record in records:
        config = record.config
        if config.norm == "kernel":
            group = groups.setdefault((config.batch_size, config.lr), {})
            group.setdefault(config.variant, []).append(record)
    variants = []
    for (batch_size, lr), group in sorted(groups.items()):
        if set(group) == {""}:
            continue
        by_seed = {
            name: {
                record.config.seed: record.accuracy for record in there if record.state == "done"
            }
            for name, there in group.items()
        }
        for name, there in sorted(group.items()):
            variants.append(
                Variant(
                    name,
                    batch_size,
                    lr,
                    dict(Counter(record.state for record in there)),
                    [record for record in there if record.state == "done"],
                    estimate(list(by_seed[name].values())),
                    difference(by_seed[name], by_seed.get("", {})) if name else None,
                )
            )
    return variants


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _accuracies(records: Sequence[Record]) -> list[float]:
    return [record.accuracy for record in records if record.state == "done"]
