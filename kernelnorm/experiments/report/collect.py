"""Finds and reads all run folders below a root folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kernelnorm.experiments.config import MAX_FLOAT, RunConfig
from kernelnorm.experiments.errors import RunError, error_message
from kernelnorm.experiments.runs import Metrics, RunFolder, final_accuracy
from kernelnorm.experiments.status import State, read_status
from kernelnorm.norms import NORMS

__all__ = ["STATES", "Collection", "Record", "Unreadable", "collect"]

STATES: tuple[State, ...] = ("done", "diverged", "failed", "running", "unfinished")
"""The states of runs that have a folder, in the order in which they are counted."""

MOST = 1 << 31
"""The largest valid batch size, and number of images or epochs."""

_SIGNS = {"config.yaml", "metrics.jsonl", "failure.json", "last.ckpt", ".lock"}
"""A folder with one of these files is the folder of a run."""


@dataclass(frozen=True)
class Record:
    """One run, as read from its folder.

    Args:
        folder: its folder, relative to the root.
        config: its configuration.
        state: one of :data:`STATES`.
        message: why it diverged or failed, or an empty string.
        history: the metrics of its finished epochs.
        found: the rest of ``config.yaml``, such as ``classes``, ``image_shape``, ``environment``.
    """

    folder: str
    config: RunConfig
    state: State
    message: str
    history: Sequence[Metrics]
    found: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """The final accuracy of a finished run, in percent: the mean over its last five epochs."""
        return 100 * final_accuracy(self.history)

    @property
    def test_accuracies(self) -> list[float]:
        """The test accuracy after each epoch, in percent."""
        return [100 * metrics["test_accuracy"] for metrics in self.history]

    @property
    def train_losses(self) -> list[float]:
        """The mean training loss of each epoch."""
        return [metrics["train_loss"] for metrics in self.history]

    @property
    def seconds(self) -> list[float]:
        """The training time of each epoch, in seconds."""
        return [metrics["seconds"] for metrics in self.history]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprints of the training and test images; empty if they are not recorded."""
        names = [f"{split}_fingerprint" for split in ("train", "test")]
        return tuple(str(self.found[name]) for name in names if name in self.found)

    def as_dict(self) -> dict[str, Any]:
        """Return the run as a dict for JSON, with accuracies in percent."""
        config = self.config
        return {
            "folder": self.folder,
            "norm": config.norm,
            "batch_size": config.batch_size,
            "lr": config.lr,
            "seed": config.seed,
            "variant": config.variant,
            "state": self.state,
            "message": self.message,
            "final_accuracy": self.accuracy if self.state == "done" else None,
            "train_loss": self.train_losses,
            "test_accuracy": self.test_accuracies,
            "seconds": self.seconds,
            "epsilon": [metrics["epsilon"] for metrics in self.history if "epsilon" in metrics],
        }


@dataclass(frozen=True)
class Unreadable:
    """A run folder that the report leaves out, and the reason."""

    folder: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """All run folders below a root."""

    records: list[Record]
    unreadable: list[Unreadable]


def collect(root: Path, out: Path) -> Collection:
    """Read every run folder below a root, also links; a run with two folders is counted once.

    Args:
        root: the folder that is searched.
        out: the report's own folder, which is not searched.

    Raises:
        RunError: ``root`` is not a folder, or has no run that can be read.
    """
    if not root.is_dir():
        raise RunError(f"{root} is not a folder: give the folder of runs, such as runs/")
    root = root.absolute()
    folders = sorted(_run_folders(root, out.absolute()))
    records: dict[tuple[str, ...], Record] = {}
    unreadable = []
    for folder in tqdm(folders, unit=" runs", leave=False, disable=None, dynamic_ncols=True):
        place = folder.relative_to(root).as_posix()
        try:
            record = _read(folder, root)
        except Exception as error:  # reading a damaged file can raise anything
            reason = error_message(error)
            unreadable.append(Unreadable(place, reason.replace(f"{root}{os.sep}", "")))
            continue
        run = record.config.name, *record.fingerprints
        other = records.setdefault(run, record)
        if other is not record:
            # Count the folder with more progress.
            kept, left = sorted((other, record), key=_progress, reverse=True)
            records[run] = kept
            unreadable.append(Unreadable(left.folder, f"the same run as {kept.folder}"))
    if not records:
        problems = "".join(f"; {item.folder}: {item.reason}" for item in unreadable[:3])
        raise RunError(
            f"there are no runs under {root}{problems}. "
            "Train some with kernelnorm train, sweep or reproduce, or give their folder"
        )
    return Collection(list(records.values()), unreadable)


def _run_folders(root: Path, out: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(root):
        here = Path(path)
        if not _SIGNS.isdisjoint(files):
            yield here
        folders[:] = [name for name in folders if here / name not in (out, root / "report")]
        for place in map(here.__truediv__, folders):  # os.walk does not enter links
            if place.is_symlink() and any((place / sign).exists() for sign in _SIGNS):
                yield place


def _progress(record: Record) -> tuple[bool, int]:
    return record.state == "done", len(record.history)


def _read(path: Path, root: Path) -> Record:
    if not (path / "config.yaml").exists():
        raise RunError("it has no config.yaml: the run has not written it yet, or it was lost")
    folder = RunFolder(path)
    found = folder.read_config()
    config = RunConfig.from_dict(found.pop("run"))
    _check(config, found)
    status = read_status(folder, config)
    for line, metrics in enumerate(status.history, 1):
        if metrics["seconds"] <= 0:
            raise RunError(f"metrics.jsonl, line {line}: seconds must be a positive number")
    message = status.message.replace(f"{root}{os.sep}", "")
    place = path.relative_to(root).as_posix()
    return Record(place, config, status.state, message, status.history, found)


def _check(config: RunConfig, found: dict[str, Any]) -> None:
    """Raise :class:`RunError` for values that the tables cannot show."""
    if config.norm not in NORMS:
        raise RunError(f"config.yaml has an unknown norm: {config.norm!r}")
    numbers = {name: getattr(config, name) for name in ("batch_size", "epochs", "lr")}
    numbers |= {name: found[name] for name in ("train_images", "test_images") if name in found}
    for name, value in numbers.items():
        most = MAX_FLOAT if name == "lr" else MOST
        if not (isinstance(value, (int, float)) and 0 < value <= most):
            shown = str(value)[:20]
            raise RunError(f"config.yaml: {name} must be a positive number, got {shown!r}")
    try:
        _ = config.name, config.variant
    except TypeError as error:  # YAML has dates, and keys of any type
        raise RunError(f"config.yaml: model_options cannot be read ({error})") from error
