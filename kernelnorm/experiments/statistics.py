"""Means, deviations and paired differences over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit  # scipy.stats takes a second to import

__all__ = ["Difference", "Estimate", "difference", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """The mean over runs, the sample deviation (``None`` for a single run), the number of runs."""

    mean: float
    deviation: float | None
    runs: int


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its 95 % confidence interval (``None`` for one pair)."""

    mean: float
    interval: tuple[float, float] | None
    pairs: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return mean and sample deviation; ``None`` if there are no values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), deviation, len(values))


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    r"""Return the mean of ``first`` minus ``second``, paired by seed, with its interval.

    Only seeds that both have count; the result is ``None`` if there are none. The interval of
    :math:`n` differences with mean :math:`\bar d` and sample deviation :math:`s` is

    .. math:: \bar d \pm t_{0.975, n-1} \frac{s}{\sqrt n}

    Args:
        first: values by seed.
        second: the values that are subtracted.
    """
    seeds = sorted(first.keys() & second.keys())
    differences = estimate([first[seed] - second[seed] for seed in seeds])
    if differences is None:
        return None
    if differences.deviation is None:
        return Difference(differences.mean, None, 1)
    pairs = differences.runs
    half = float(stdtrit(pairs - 1, 0.975)) * differences.deviation / math.sqrt(pairs)
    return Difference(differences.mean, (differences.mean - half, differences.mean + half), pairs)
