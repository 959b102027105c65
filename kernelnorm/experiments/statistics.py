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
    """The mean of some runs, their sample deviation (``None`` of a single run), their number."""

    mean: float
    deviation: float | None
    runs: int


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its 95 % confidence interval, if there are two pairs."""

    mean: float
    interval: tuple[float, float] | None
    pairs: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return mean and sample deviation; ``None`` of nothing."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), deviation, len(values))


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    r"""Return ``first`` minus ``second``, paired by the seeds that both have, with its interval.

    Of :math:`n` differences with mean :math:`\bar d` and sample deviation :math:`s`, it is

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
