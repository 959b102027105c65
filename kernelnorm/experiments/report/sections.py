"""Sections of the report: runs that differ only in what the tables compare."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from kernelnorm.experiments.config import AGC, RunConfig
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.paper import paper, paper_accuracy, paper_lr, paper_time
from kernelnorm.experiments.recipes import RECIPES, Recipe
from kernelnorm.experiments.report.cells import Cell, Variant, make_cell, make_variants
from kernelnorm.experiments.report.collect import STATES, Record
from kernelnorm.experiments.report.leaderboard import Standing, make_standings
from kernelnorm.experiments.runs import environments
from kernelnorm.experiments.statistics import Difference, difference
from kernelnorm.experiments.style import LABELS

__all__ = ["Comparison", "Section", "make_sections"]

_TOLD_APART = ("case", "epochs", "model_options", "lr_table")
"""Fields whose deviations have phrases of their own, or are not reported."""


@dataclass(frozen=True)
class Comparison:
    """Kernel minus batch normalisation at one batch size, in percentage points."""

    batch_size: int
    difference: Difference | None
    paper: float | None


@dataclass(frozen=True)
class Section:
    """One case, and all that is computed from its runs.

    Args:
        config: the configuration of one run; model, data and training are the same in all runs.
        records: its runs.
        cells: the runs with the paper's rules, by normalisation and batch size: one for each pair
            of a normalisation and a batch size in these runs, even if no run has the pair.
        standings: the norms ranked at each batch size, with what they cost.
        comparisons: kernel against batch normalisation.
        variants: kernel networks with changed rules.
        deviations: how the training differs from the paper's, as phrases; empty if it does not, or
            if the case is not one of the paper's.
    """

    config: RunConfig
    records: list[Record]
    cells: dict[tuple[str, int], Cell]
    standings: list[Standing]
    comparisons: list[Comparison]
    variants: list[Variant]
    deviations: list[str]

    @property
    def norms(self) -> list[str]:
        """The normalisations of the grid, in the order of the tables."""
        return [norm for norm in LABELS if any(norm == there for there, _ in self.cells)]

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes of the grid."""
        return sorted({batch_size for _, batch_size in self.cells})

    @property
    def missing(self) -> list[Cell]:
        """The cells of the grid that have no run at all."""
        return [cell for cell in self.cells.values() if not cell.rates]

    @property
    def counts(self) -> dict[str, int]:
        """The number of runs in each state."""
        states = Counter(record.state for record in self.records)
        return {state: states[state] for state in STATES}

    @property
    def environments(self) -> dict[str, int]:
        """The number of runs by environment: the versions and the device, in words."""
        return dict(Counter(_environment(record.found) for record in self.records).most_common())

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as a dict for JSON, with accuracies in percent."""
        config, cells = self.config, []
        for cell in self.cells.values():
            where = (config.case, cell.norm, cell.batch_size)
            times = ("seconds_per_epoch", "minutes")
            cells.append(
                {
                    **asdict(cell),
                    "records": [record.folder for record in cell.records],
                    "absence": "" if cell.accuracy else cell.absence,
                    "paper": {
                        "accuracy": paper_accuracy(*where),
                        "lr": paper_lr(*where),
                        **{name: paper_time(name, *where) for name in times},
                    },
                }
            )
        variants = [
            {**asdict(variant), "records": [record.folder for record in variant.records]}
            for variant in self.variants
        ]
        return {
            "case": config.case,
            "setting": _setting(config),
            "deviations": self.deviations,
            "environments": self.environments,
            "counts": {**self.counts, "missing": len(self.missing)},
            "cells": cells,
            "leaderboard": [asdict(standing) for standing in self.standings],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "variants": variants,
            "runs": [record.as_dict() for record in self.records],
        }


def make_sections(records: Sequence[Record]) -> list[Section]:
    """Group the runs, so that those of a section differ only in norm, batch size, learning rate,
    seed and rules; the paper's cases come first.

    Images are recognised by their fingerprints, whatever the path of their folder. A run without
    fingerprints, such as one that failed before it loaded images, belongs to the runs with its
    path, if all of these have the same images.

    Raises:
        RunError: two runs of a section differ in nothing that the tables compare.
    """
    images: dict[str, set[tuple[str, ...]]] = {}
    for record in records:
        known = images.setdefault(_key(_setting(record.config)), set())
        known.update([record.fingerprints] if record.fingerprints else [])
    groups: dict[str, list[Record]] = {}
    for record in records:
        setting = _setting(record.config)
        known = images[_key(setting)]
        found = record.fingerprints or (next(iter(known)) if len(known) == 1 else ())
        setting["dataset"] = found or setting["dataset"]
        groups.setdefault(_key(setting), []).append(record)
    return sorted((_make_section(group) for group in groups.values()), key=_place)


def _key(setting: Mapping[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)


def _place(section: Section) -> tuple[int, str, int]:
    order, case = [case for case in RECIPES if case in paper()], section.config.case
    place = order.index(case) if case in order else len(order)
    return place, case, len(section.deviations)


def _make_section(group: Sequence[Record]) -> Section:
    records = sorted(group, key=_row)
    for one, other in pairwise(record for record in records if record.state == "done"):
        if _row(one) == _row(other):
            raise RunError(
                f"{one.folder} and {other.folder} have the same normalisation, batch size, "
                "learning rate, seed and rules: move one of them to another folder, and report it "
                "there"
            )
    config = records[0].config
    plain = [record for record in records if not record.config.variant]
    grid = [
        (norm, batch_size)
        for batch_size in sorted({record.config.batch_size for record in plain})
        for norm in LABELS
        if any(record.config.norm == norm for record in plain)
    ]
    cells = {
        (norm, size): make_cell(
            norm,
            size,
            [r for r in plain if (r.config.norm, r.config.batch_size) == (norm, size)],
        )
        for norm, size in grid
    }
    found = max((record.found for record in records), key=len)
    return Section(
        config,
        records,
        cells,
        make_standings(cells),
        _comparisons(config.case, cells),
        make_variants(records),
        _deviations(config, found),
    )


def _row(record: Record) -> tuple[Any, ...]:
    config = record.config
    norm = [*LABELS].index(config.norm)
    return config.batch_size, norm, config.variant, config.lr, config.seed


def _comparisons(case: str, cells: dict[tuple[str, int], Cell]) -> list[Comparison]:
    comparisons = []
    for (norm, batch_size), kernel in cells.items():
        batch = cells.get(("batch", batch_size))
        if norm != "kernel" or batch is None:
            continue
        means = [paper_accuracy(case, name, batch_size) for name in ("kernel", "batch")]
        papers = means[0][0] - means[1][0] if means[0] and means[1] else None
        found = difference(kernel.accuracies, batch.accuracies)
        comparisons.append(Comparison(batch_size, found, papers))
    return comparisons


def _setting(config: RunConfig) -> dict[str, Any]:
    """Return the options that are the same in all runs of a section."""
    setting = config.as_dict()
    for name in ("norm", "batch_size", "lr", "seed"):
        del setting[name]
    setting["model_options"].pop("rules", None)
    if setting["agc"] in (None, AGC):  # the default of the norms that need it
        del setting["agc"]
    return setting


def _environment(found: dict[str, Any]) -> str:
    texts = [
        ", ".join(f"{name} {value}" for name, value in environment.items())
        for environment in environments(found)
    ]
    return "; later ".join(texts) or "unknown versions and device"


def _deviations(config: RunConfig, found: Mapping[str, Any]) -> list[str]:
    """Return how the training differs from the paper's, as phrases.

    The list is empty if nothing differs, or if the case is not one of the paper's.

    Args:
        config: the configuration of a run.
        found: the rest of its ``config.yaml``.
    """
    if config.case not in paper():
        return []
    data, recipe = paper()[config.case]["data"], RECIPES[config.case]
    phrases = []
    for split, kind in (("train_images", "training"), ("test_images", "test")):
        images = found.get(split, config.subset)
        if images is not None and images != data[split]:
            phrases.append(f"{images:,} of {data[split]:,} {kind} images")
    if config.epochs != recipe.epochs:
        phrases.append(f"{config.epochs} epochs in place of {recipe.epochs}")
    options = {name: value for name, value in config.model_options.items() if name != "rules"}
    phrases += [f"{name} {value}" for name, value in sorted(options.items())]
    if config.private is not None:
        phrases.append(f"differential privacy with epsilon {config.private.epsilon:g}")
    if config.precision != "32-true":
        phrases.append(f"precision {config.precision}")
    for field in fields(Recipe):
        ours, theirs = getattr(config, field.name), getattr(recipe, field.name)
        if field.name not in _TOLD_APART and ours != theirs:
            phrases.append(f"{field.name} {ours} in place of {theirs}")
    return phrases
