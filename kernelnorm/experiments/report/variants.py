"""Ablations: kernel networks whose rules were changed, beside those with the paper's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kernelnorm.experiments.report.collect import Record
from kernelnorm.experiments.report.statistics import Difference, Estimate, difference, estimate

__all__ = ["Variant", "make_variants"]


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
