"""Compare normalisations: train the missing runs, then write a table and a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from lightning_fabric.utilities.rank_zero import rank_zero_only
from matplotlib.figure import Figure
from torch.distributed import is_torchelastic_launched
from tqdm import tqdm

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.errors import BusyError, DivergedError, RunError
from kernelnorm.experiments.files import write_atomically
from kernelnorm.experiments.inputs import ImageCheck
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.plotting import (
    MEAN_LABEL,
    epoch_axes,
    legend,
    mean_line,
    plain_log,
    png,
)
from kernelnorm.experiments.runs import Metrics, RunFolder, final_accuracy
from kernelnorm.experiments.status import Status, read_status
from kernelnorm.experiments.style import LABELS, line_style
from kernelnorm.experiments.trainer import train
from kernelnorm.norms import describe

__all__ = ["Row", "compare"]

_HEADINGS = ("norm", "batch size", "lr", "epochs", "train loss", "test accuracy", "s/epoch")
_CAPTION = "Test accuracy is the mean over the last five epochs (over all, if there are fewer)."


@dataclass(frozen=True)
class Row:
    """One run of a comparison; ``failure`` says why there is no accuracy."""

    config: RunConfig
    history: Sequence[Metrics]
    failure: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row's cells, as text."""
        config, history = self.config, self.history
        choices = (LABELS[config.norm], str(config.batch_size), f"{config.lr:g}")
        if self.failure:
            return (*choices, "-", "-", "failed", "-")
        return (
            *choices,
            str(len(history)),
            f"{history[-1]['train_loss']:.4f}",
            f"{final_accuracy(history):.2%}",
            f"{median(metrics['seconds'] for metrics in history):.2f}",  # the first one may compile
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the row as an object for JSON."""
        return {
            "folder": self.config.name,
            "group": describe(self.config.norm).group,
            "run": self.config.as_dict(),
            "failure": self.failure,
            "final_accuracy": None if self.failure else final_accuracy(self.history),
            "metrics": list(self.history),
        }


def compare(configs: Sequence[RunConfig], out: Path, launch: Launch | None = None) -> list[Row]:
    """Train the runs that are missing or unfinished, and compare all of them.

    Each run that ends adds a row to the table, on the screen and in ``comparison.md`` and
    ``comparison.json`` in ``out``; ``comparison.png`` is drawn at the end. A progress bar counts
    the epochs of all runs. A run that diverges, or cannot be trained, is a row with the reason
    below it; the other runs are still trained. A run that another process trains is waited for.
    A run that is done is not trained again, also if its checkpoints were deleted.

    Args:
        configs: the runs, in the order of the table.
        out: the folder of the comparison and of its runs' folders.
        launch: how the runs are executed; its ``out`` is not used.

    Raises:
        DataError: images are missing or damaged.
        RunError: the table or the picture cannot be written, ``launch`` has ``max_steps``, or a run
            that is done is of other images.
    """
    launch = launch or Launch()
    if launch.max_steps is not None:
        raise RunError("a comparison trains whole runs: leave out max_steps")
    before, check = [_status(config, out) for config in configs], ImageCheck(launch.data_dir)
    for status in before:
        if status.state == "done":
            check(RunFolder(out / status.config.name), status.config)
    widths = [
        max(len(LABELS[config.norm]) for config in configs),
        *(max(len(heading), 7) for heading in _HEADINGS[1:]),
    ]
    _echo(_line(_HEADINGS, widths))
    rows: list[Row] = []
    with _bar(configs, sum(map(_epochs_done, before))) as bar:
        for status in before:
            config = status.config
            bar.set_description(f"run {len(rows) + 1} of {len(configs)}")
            end = bar.n + config.epochs - _epochs_done(status)
            folder, history = RunFolder(out / config.name), status.history
            try:
                if status.state != "done":
                    history = _trained(config, folder, launch, bar)
                row = Row(config, history)
            except RunError as error:
                # Other processes may not have this error, and would wait for this process.
                if is_torchelastic_launched() and not isinstance(error, DivergedError):
                    raise
                row = Row(config, [], str(error))
            rows.append(row)
            bar.update(end - bar.n)  # the run may have ended early
            _echo(_line(row.cells(), widths))
            if row.failure:
                _echo(f"  {row.failure}")
            rank_zero_only(_write)(rows, out)
    rank_zero_only(_write_picture)(rows, out)
    _echo(f"\n{_caption(rows)}")
    _echo(f"Table:   {out / 'comparison.md'}\nPicture: {out / 'comparison.png'}")
    return rows


@rank_zero_only
def _echo(text: str) -> None:
    """Print above the progress bars."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def _status(config: RunConfig, out: Path) -> Status:
    try:
        return read_status(RunFolder(out / config.name), config)
    except RunError:  # a file is damaged: train reports it
        return Status(config, "failed")


def _trained(
    config: RunConfig, folder: RunFolder, launch: Launch, bar: tqdm[Any]
) -> Sequence[Metrics]:
    """Train a run, after other processes that train it; return its metrics."""
    launch = replace(launch, out=folder.path, verbose=False)
    try:
        return train(config, launch, bar.update).read_metrics()
    except BusyError as error:
        if is_torchelastic_launched():
            raise
        _echo(f"waiting: {error}")
    while folder.is_locked():
        time.sleep(1)
    return _trained(config, folder, launch, bar)


def _epochs_done(status: Status) -> int:
    """Return the finished epochs of a run; all of them if it has converged."""
    return status.config.epochs if status.state == "done" else len(status.history)


def _bar(configs: Sequence[RunConfig], done: int) -> tqdm[Any]:
    """Return the bar over the epochs of all runs; the trainer's bar of one run is below it."""
    return tqdm(
        total=sum(config.epochs for config in configs),
        initial=done,
        unit=" epochs",
        smoothing=0,
        dynamic_ncols=True,
        leave=False,
        # None: only on a terminal
        disable=True if rank_zero_only.rank else None,  # type: ignore[attr-defined]
    )


def _caption(rows: Sequence[Row]) -> str:
    private = rows[0].config.private
    return _CAPTION if private is None else f"{_CAPTION} Differentially private: {private}."


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _write(rows: Sequence[Row], out: Path) -> None:
    table = [_HEADINGS, ("---", *["---:"] * (len(_HEADINGS) - 1)), *(row.cells() for row in rows)]
    groups = ["group", "---", *(describe(row.config.norm).group for row in rows)]
    lines = [
        f"| {' | '.join((norm, group, *cells))} |"
        for (norm, *cells), group in zip(table, groups, strict=True)
    ]
    title = f"# {rows[0].config.case}"
    failures = [
        f"- {LABELS[row.config.norm]}, batch size {row.config.batch_size}: {row.failure}."
        for row in rows
        if row.failure
    ]
    notes = [*failures, ""] if failures else []
    end = [_caption(rows), "", "![curves](comparison.png)", ""]
    text = "\n".join([title, "", *lines, "", *notes, *end])
    write_atomically(out / "comparison.md", text.encode())
    record = json.dumps([row.as_dict() for row in rows], indent=1)
    write_atomically(out / "comparison.json", record.encode())


def _write_picture(rows: Sequence[Row], out: Path) -> None:
    write_atomically(out / "comparison.png", png(_draw(rows)))


def _draw(rows: Sequence[Row]) -> Figure:
    """Draw training loss and test accuracy by epoch, one column for each batch size."""
    batch_sizes = sorted({row.config.batch_size for row in rows})
    figure = Figure(figsize=(max(6.5, 1 + 4 * len(batch_sizes)), 6.5), layout="constrained")
    axes = figure.subplots(2, len(batch_sizes), squeeze=False, sharex=True, sharey="row")
    for (top, bottom), batch_size in zip(axes.T, batch_sizes, strict=True):
        top.set_title(f"batch size {batch_size}")
        top.set_yscale("log")
        epoch_axes([bottom])
        for row in rows:
            if row.failure or row.config.batch_size != batch_size:
                continue
            style = {**line_style(row.config.norm), "markevery": 1 + len(row.history) // 12}
            epochs = [metrics["epoch"] for metrics in row.history]
            top.plot(epochs, [metrics["train_loss"] for metrics in row.history], **style)
            accuracies = [100 * metrics["test_accuracy"] for metrics in row.history]
            bottom.plot(epochs, accuracies, **style)
            mean_line(bottom, len(epochs), 100 * final_accuracy(row.history), style)
    plain_log(axes[0, 0].yaxis)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel(f"test accuracy, %\n({MEAN_LABEL})")
    legend(figure, axes[0])
    return figure
