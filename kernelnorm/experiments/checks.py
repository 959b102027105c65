"""Checks that a run's folder holds the same run, on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.files import is_part
from kernelnorm.experiments.private_options import Privacy
from kernelnorm.experiments.runs import RunFolder

__all__ = ["check_config", "check_data"]

_FILES = {"config.yaml", "metrics.jsonl", "last.ckpt", "best.ckpt", "failure.json", "output.txt"}
_FILES |= {".lock", "tensorboard"}
"""The files and folders that a run's folder can hold."""

_CHANGEABLE = ("dataset", "case", "epochs")
"""Fields that may change when a run resumes: images may move (:func:`check_data` compares their
fingerprint), and more epochs extend the run."""


def check_config(folder: RunFolder, config: RunConfig) -> None:
    """Check that a folder is free, or holds the run with this configuration.

    Raises:
        RunError: the folder holds another run, other files, or a checkpoint without a
            configuration, or the run cannot be extended to that number of epochs.
    """
    path = folder.path
    if not (path / "last.ckpt").exists():
        _check_is_free(path)  # nothing was trained
        if (path / "config.yaml").exists():
            folder.read_config()  # refuses the file of another program
        return
    if not (path / "config.yaml").exists():
        raise RunError(f"{path} has a checkpoint but no config.yaml: give another --out")
    record = config.as_dict()
    there = {**config.defaults(), **folder.read_config()["run"]}  # old runs lack new fields
    before, now = _flat(there), _flat(record)
    differing = [
        f"{key} is {before.get(key)!r} there and {now.get(key)!r} here"
        for key in {**now, **before}
        if before.get(key) != now.get(key) and key not in _CHANGEABLE
    ]
    if differing:
        raise RunError(
            f"{path} holds another run: {'; '.join(differing)}. "
            "Give another --out, or the options of that run to resume it"
        )
    epochs, more = there.get("epochs"), config.epochs
    if isinstance(epochs, int) and epochs != more:
        _check_extension(path, epochs, config)


def _check_extension(path: Path, epochs: int, config: RunConfig) -> None:
    """Check that a run of ``epochs`` epochs can be extended to ``config.epochs``."""
    more = config.epochs
    if more < epochs:
        raise RunError(
            f"{path} holds a run of {epochs} epochs, more than {more}: a run can only be "
            "extended. Give another --out"
        )
    if config.private is not None:
        raise RunError(
            f"{path} holds a private run of {epochs} epochs, whose noise was chosen such "
            f"that they spend its epsilon: it cannot be extended to {more}. Give another "
            f"--out, to train anew with the noise for {more} epochs"
        )
    if config.schedule == "cosine":
        raise RunError(
            f"{path} holds a run of {epochs} epochs whose learning rate has fallen to "
            f"zero along a cosine: it cannot be extended. Give another --out, and "
            f"--init-from {path}"
        )


def check_data(folder: RunFolder, found: Mapping[str, Any]) -> None:
    """Check that the images match the description in ``config.yaml``.

    Args:
        folder: the run's folder.
        found: what :func:`.inputs.describe_images` returns for the images.

    Raises:
        RunError: the images have changed since the run started.
    """
    there = folder.read_config()
    differing = [key for key, value in found.items() if there.get(key, value) != value]
    told = [key for key in differing if not key.endswith("_fingerprint")]
    changed = [f"{key} was {there[key]!r} and is {found[key]!r}" for key in told] or [
        f"the {key.replace('train', 'training').removesuffix('_fingerprint')} images have "
        "changed, or their order"
        for key in differing
    ]
    if changed:
        raise RunError(
            f"the data of {folder.path} has changed: {'; '.join(changed)}. "
            "Restore it, or train on the new images with another --out"
        )


def _check_is_free(path: Path) -> None:
    """Check that a folder holds only files that a run writes."""
    if not path.is_dir():
        return
    strange = sorted(
        place.name
        for place in path.iterdir()
        if place.name not in _FILES and not is_part(place.name)
    )
    if strange:
        raise RunError(
            f"{path} is not empty and not the folder of a run: it has {strange[0]}. "
            "Give another --out"
        )


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields; ``private`` is a bool, and its options are fields ``"private NAME"``."""
    private = record.get("private")
    options: dict[str, Any] = {}
    if isinstance(private, dict):
        options = {**asdict(Privacy()), **private}  # old runs lack new options
    whether = {"private": private is not None}
    return {**record, **whether, **{f"private {name}": options[name] for name in options}}
