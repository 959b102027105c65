"""Appendix B of the paper: which learning rates have to be tried, and which one is the best.

A result is the final accuracy of a run, or minus infinity for one that has diverged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["TUNING_SEED", "best_rate", "rates_to_try"]

TUNING_SEED = 0
"""The seed of the runs that find the best learning rate; the repetitions have other seeds."""


def best_rate(results: Mapping[float, float]) -> float | None:
    """Return the learning rate with the best result, or the lowest of them if results are equal to
    nine digits; ``None`` if all runs have diverged.

    Example::

        >>> best_rate({0.1: -math.inf, 0.05: 0.82, 0.025: 0.84, 0.01: 0.84})
        0.01
    """
    return min(_best(results), default=None)


def _best(results: Mapping[float, float]) -> list[float]:
    """Return all learning rates with the best result."""
    rounded = {lr: round(x, 9) for lr, x in results.items() if x > -math.inf}
    return [lr for lr, x in rounded.items() if x == max(rounded.values())]


def rates_to_try(
    rates: Sequence[float], start: float, results: Mapping[float, float], *, every: bool = False
) -> list[float]:
    """Return the learning rates that have to be tried next; none when the search has ended.

    The search begins with the rate that is nearest to ``start`` and its two neighbours, and goes
    uphill until the neighbours of the best rate are worse. The paper: "if the model gives higher
    accuracy with learning rate of 0.05 compared to 0.1 and 0.025 [...], then it is unlikely the
    model will achieve better accuracy with much lower or higher learning rates". If several
    rates are equally good, for instance because no run has learned anything, the search goes on at
    the neighbours of each of them. If all runs have diverged, it goes on at the next lower rate.

    The search has no state: it depends on the arguments alone, so a stopped search can resume.

    Args:
        rates: the learning rates of the case.
        start: the rate that is expected to be the best.
        results: the results of the rates that have been tried.
        every: try all rates.

    Example::

        >>> rates = [0.1, 0.05, 0.025, 0.01, 0.005]
        >>> rates_to_try(rates, 0.02, {})
        [0.05, 0.025, 0.01]
        >>> rates_to_try(rates, 0.02, {0.05: 0.80, 0.025: 0.82, 0.01: 0.83})
        [0.005]
        >>> rates_to_try(rates, 0.02, {0.05: 0.80, 0.025: 0.82, 0.01: 0.83, 0.005: 0.81})
        []
        >>> rates_to_try(rates, 0.02, {0.05: 0.10, 0.025: 0.10, 0.01: 0.10})
        [0.1, 0.005]
    """
    ladder = sorted(rates, reverse=True)
    known = {lr: results[lr] for lr in ladder if lr in results}

    def unknown(lrs: Sequence[float]) -> list[float]:
        return [lr for lr in lrs if lr not in known]

    def around(lr: float) -> list[float]:
        place = ladder.index(lr)
        return ladder[max(place - 1, 0) : place + 2]

    if every:
        return unknown(ladder)
    if first := unknown(around(min(ladder, key=lambda lr: abs(math.log(lr / start))))):
        return first
    best = _best(known) or [min(known)]
    return unknown([lr for lr in ladder if any(lr in around(one) for one in best)])
