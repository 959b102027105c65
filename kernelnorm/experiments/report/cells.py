"""Means over seeds: cells of the tables, and variants of the rules."""

from __future__ import annotations

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
        if self.diverged:
            return f"all {self.diverged} repetitions diverged"
        states = Counter[str]()
        for rate in self.rates:
            states.update(rate.states)
        if not states:
            return "no run"
        if set(states) == {"diverged"}:
            rates = len(self.rates)
            return f"diverged at all {rates} learning rates" if rates > 1 else "diverged"
        there = (state for state in ("running", "unfinished", "failed") if states[state])
        return next(there, "unfinished")


def make_cell(norm: str, batch_size: int, records: Sequence[Record]) -> Cell:
    """Choose the best learning rate, and the runs that count.

    Seed 0 tunes: the best rate is that with the best final accuracy of seed 0. The other seeds at
    that rate repeat it, and only they count, if any has ended, though it may have diverged; where
    there was one rate only, nothing was tuned, and all count. Where a rate has no run of seed 0,
    the best mean over the seeds tells the rate.

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
    tuning = [record for record in done if record.config.seed == TUNING_SEED]
    if {record.config.lr for record in tuning} != {record.config.lr for record in done}:
        tuning = done
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
    if len(by_rate) > 1 and any(record.state in ("done", "diverged") for record in others):
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
        _median([seconds for record in ended for seconds in record.seconds]),
        _median([sum(record.seconds) / 60 for record in ended]),
    )


@dataclass(frozen=True)
class Variant:
    """One variant at one batch size and learning rate; accuracies are in percent.

    Args:
        name: what it changes, see :attr:`RunConfig.variant`; ``""`` changes nothing.
        batch_size: images a step.
        lr: the learning rate.
        states: how many runs are in which state.
        records: the runs that are done.
        accuracy: their mean and deviation.
        to_paper: the difference to the paper's rules, paired by seed.
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
        """The name that people read."""
        return self.name or "the paper's rules"

    @property
    def of_dropout(self) -> bool:
        """Tell whether nothing but the dropout on the statistics was changed."""
        changed = [part.split("=")[0] for part in self.name.split(", ") if part]
        return set(changed) <= {"dropout_p", "head_dropout_p"}


def make_variants(records: Sequence[Record]) -> list[Variant]:
    """Return the variants, wherever there is another than the paper's rules.

    Args:
        records: runs of one case that differ in norm, batch size, learning rate, seed and rules.
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
