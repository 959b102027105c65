"""Plans of sweeps: the runs that are wanted, given the results so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.tuning import best_rate, rates_to_try

__all__ = ["Grid", "Plan", "Result", "Tuned"]

Result = Callable[[RunConfig], float | None]
"""A run's final accuracy; minus infinity if it has diverged, ``None`` if it has not ended."""


class Plan(Protocol):
    """The runs that a sweep wants. A plan has no state: the runs depend on the results alone."""

    @property
    def note(self) -> str:
        """The note above each table of these runs; may be empty."""

    def runs(self, result: Result) -> list[RunConfig]:
        """Return all runs that are wanted so far, including those that have ended."""

    def extent(self, result: Result) -> tuple[int, int]:
        """Return the fewest and the most runs that there will be in the end."""


@dataclass(frozen=True)
class Grid:
    """A plan that wants all its runs from the start."""

    configs: Sequence[RunConfig]
    note: str = ""

    def runs(self, result: Result) -> list[RunConfig]:
        """Return the runs, whatever the results."""
        return [*self.configs]

    def extent(self, result: Result) -> tuple[int, int]:
        """Return the number of runs, twice."""
        return len(self.configs), len(self.configs)


@dataclass(frozen=True)
class Tuned:
    """The paper's protocol: the best learning rate of each norm and batch size, then repetitions.

    Args:
        cells: a run for each norm and batch size, at the learning rate where the search begins.
        rates: the learning rates of the case.
        seeds: of the repetitions.
        every: try all rates, instead of the search of :func:`.tuning.rates_to_try`.
        note: the note above each table of these runs.
    """

    cells: Sequence[RunConfig]
    rates: Sequence[float]
    seeds: Sequence[int] = (1, 2, 3)
    every: bool = False
    note: str = ""

    def runs(self, result: Result) -> list[RunConfig]:
        """Return the runs that have been tried, those to try next, and the repetitions."""
        runs = []
        for cell in self.cells:
            results, untried = self._search(cell, result)
            runs += [replace(cell, lr=lr) for lr in (*results, *untried)]
            if not untried and (best := best_rate(results)) is not None:
                runs += [replace(cell, lr=best, seed=seed) for seed in self.seeds]
        return runs

    def extent(self, result: Result) -> tuple[int, int]:
        """Return the number of runs if the search ends soon, and if it tries all rates."""
        fewest = most = 0
        for cell in self.cells:
            results, untried = self._search(cell, result)
            least = len(results) + len(untried)
            repetitions = len(self.seeds) if untried or best_rate(results) is not None else 0
            fewest += least + repetitions
            most += (len(self.rates) if untried else least) + repetitions
        return fewest, most

    def _search(self, cell: RunConfig, result: Result) -> tuple[dict[float, float], list[float]]:
        """Return the results of a norm and batch size, and the learning rates to try next."""
        found = {lr: result(replace(cell, lr=lr)) for lr in self.rates}
        results = {lr: value for lr, value in found.items() if value is not None}
        return results, rates_to_try(self.rates, cell.lr, results, every=self.every)
