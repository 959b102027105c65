"""The norms of a section ranked by accuracy, batch size by batch size, with what each one costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import torch
from tqdm import tqdm

from kernelnorm.experiments.bench import saved_bytes
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.networks import build_network
from kernelnorm.experiments.report.cells import Cell
from kernelnorm.experiments.report.collect import Record
from kernelnorm.experiments.runs import environments
from kernelnorm.experiments.statistics import Difference, Estimate, difference
from kernelnorm.norms import describe

__all__ = ["Standing", "make_standings"]

_BEST = 3
"""Number of best norms; epochs are counted to the training loss that all of these reach."""

_SIZES = (2, 3)
"""Batch sizes at which memory is measured; BatchNorm needs two images to train."""


@dataclass(frozen=True)
class Standing:
    """The place of a norm at one batch size.

    Args:
        batch_size: images per step.
        rank: 1 for the highest mean accuracy; ``None`` if no run is done. Norms with a diverged run
            rank behind the others.
        norm: the normalisation.
        group: ``"batch-dependent"``, ``"batch-independent"`` or ``"weight-based"``.
        accuracy: final accuracy in percent, mean and deviation over seeds.
        diverged: the number of runs that count and have diverged.
        to_kernel: KernelNorm's accuracy minus this one's, paired by seed.
        last: accuracy after the last epoch, in percent, the mean over seeds.
        absence: why there is no accuracy, or an empty string.
        loss: the training loss to which epochs are counted, the same for all norms at a batch
            size: the lowest that all seeds of the three most accurate norms reach, rounded up to
            three digits.
        epochs: the number of epochs until the mean training loss of an epoch is at most ``loss``,
            the median over seeds; ``None`` if the median run does not reach it, or has diverged.
        seconds_per_step: the median over epochs and runs; ``None`` if the section's runs differ in
            their device, processes, threads or compilation.
        saved_bytes: the bytes stored for the backward pass, per image of a batch of this size.
        batch_one: whether the norm is meant for training with one image per batch.
        needs: what training needs in addition to the optimizer.
    """

    batch_size: int
    rank: int | None
    norm: str
    group: str
    accuracy: Estimate | None
    diverged: int
    to_kernel: Difference | None
    last: float | None
    absence: str
    loss: float | None
    epochs: float | None
    seconds_per_step: float | None
    saved_bytes: float | None
    batch_one: bool
    needs: tuple[str, ...]


def make_standings(cells: Mapping[tuple[str, int], Cell]) -> list[Standing]:
    """Rank the norms at each batch size; return an empty list for fewer than two norms.

    Args:
        cells: the cells of a section, by norm and batch size.
    """
    if len({norm for norm, _ in cells}) < 2:
        return []
    sizes = sorted({batch_size for _, batch_size in cells})
    memory = _measure(cells)
    records = [record for cell in cells.values() for record in _done(cell)]
    comparable = _have_comparable_times(records)
    standings = []
    for batch_size in sizes:
        tried = [cell for cell in cells.values() if cell.batch_size == batch_size and cell.rates]
        # Norms with equal keys, such as those without an accuracy, keep the order of the groups.
        ranked = sorted(tried, key=_order)
        loss = _loss_of_the_best(ranked)
        kernel = cells.get(("kernel", batch_size))
        for cell in ranked:
            rank = 1 + sum(_order(other) < _order(cell) for other in ranked)
            norm, kept = describe(cell.norm), memory.get(cell.norm)
            runs = _done(cell)
            standings.append(
                Standing(
                    batch_size,
                    rank if cell.accuracy else None,
                    cell.norm,
                    norm.group,
                    cell.accuracy,
                    cell.diverged,
                    difference(kernel.accuracies, cell.accuracies)
                    if kernel and kernel is not cell
                    else None,
                    statistics.fmean(run.test_accuracies[-1] for run in runs) if runs else None,
                    "" if cell.accuracy else cell.absence,
                    loss,
                    None if loss is None else _epochs_to(loss, runs, cell.diverged),
                    _seconds_per_step(runs) if comparable else None,
                    None if kept is None else kept[0] / batch_size + kept[1],
                    norm.batch_one,
                    norm.needs,
                )
            )
    return standings


def _order(cell: Cell) -> tuple[bool, bool, float]:
    """Return the sort key of a cell: cells with a diverged run come after those without, and cells
    without an accuracy come last.
    """
    mean = cell.accuracy.mean if cell.accuracy else -math.inf
    return cell.accuracy is None, cell.diverged > 0, -mean


def _have_comparable_times(records: Sequence[Record]) -> bool:
    """Tell whether the runs had one device, and one number of processes and of threads where it is
    recorded, and whether all or none of them were compiled.
    """
    found = [place for record in records for place in environments(record.found)]
    compiled = {bool(place.get("compile")) for place in found}
    return len(compiled) < 2 and all(
        len({str(place[name]) for place in found if name in place}) < 2
        for name in ("device", "processes", "threads")
    )


def _done(cell: Cell) -> list[Record]:
    return [record for record in cell.records if record.state == "done"]


def _loss_of_the_best(ranked: Sequence[Cell]) -> float | None:
    runs = [record for cell in ranked[:_BEST] for record in _done(cell)]
    if not runs:
        return None
    loss = max(min(record.train_losses) for record in runs)
    return float(Context(prec=3, rounding=ROUND_CEILING).create_decimal_from_float(loss))


def _epochs_to(loss: float, runs: Sequence[Record], diverged: int) -> float | None:
    firsts = [
        next((epoch for epoch, x in enumerate(record.train_losses, 1) if x <= loss), math.inf)
        for record in runs
    ]
    firsts += [math.inf] * diverged
    epochs = statistics.median(firsts) if firsts else math.inf
    return epochs if math.isfinite(epochs) else None


def _seconds_per_step(runs: Sequence[Record]) -> float | None:
    seconds = [
        record.config.batch_size / metrics["images_per_second"]
        for record in runs
        for metrics in record.history
        if metrics.get("images_per_second")
    ]
    return statistics.median(seconds) if seconds else None


def _measure(cells: Mapping[tuple[str, int], Cell]) -> dict[str, tuple[int, int]]:
    """Return the bytes that each norm's network stores for the backward pass: those per batch,
    such as standardised weights, and those per image.
    """
    runs = {cell.norm: _done(cell)[0] for cell in cells.values() if _done(cell)}
    memory = {}
    # The progress bar appears after two seconds.
    for norm, record in tqdm(
        runs.items(), desc="memory", unit=" norms", leave=False, disable=None, delay=2
    ):
        measured = _measure_run(record)
        if measured:
            memory[norm] = measured
    return memory


def _measure_run(record: Record) -> tuple[int, int] | None:
    """Measure the network of a run; ``None`` for private training, whose hooks store more, and if
    ``config.yaml`` lacks the images' shape or classes, or this version cannot build the network.
    """
    if record.config.private is not None:
        return None
    try:
        channels, height, width = map(int, record.found["image_shape"])
        classes = len(record.found["classes"])
        with torch.random.fork_rng(devices=[]):
            network = build_network(
                record.config, num_classes=classes, in_channels=channels
            ).train()
            low, high = (
                saved_bytes(
                    network,
                    torch.rand(size, channels, height, width).contiguous(
                        memory_format=torch.channels_last
                    ),
                )
                for size in _SIZES
            )
    except (LookupError, RunError, RuntimeError, TypeError, ValueError):
        return None
    per_image = (high - low) // (_SIZES[1] - _SIZES[0])
    return low - _SIZES[0] * per_image, per_image
