"""The files of a run's folder, each written whole or not at all."""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch
import yaml

from kernelnorm.experiments.data import DataError

if sys.platform != "win32":
    import fcntl

__all__ = [
    "DivergedError",
    "FailureKind",
    "Metrics",
    "RunError",
    "RunFolder",
    "error_message",
    "final_accuracy",
    "write_whole",
]

Metrics = dict[str, float]
"""One line of ``metrics.jsonl``; accuracies are fractions."""

_FILES = {"config.yaml", "metrics.jsonl", "last.ckpt", "best.ckpt", "failure.json", "output.txt"}
_FILES |= {".lock", "tensorboard"}
"""What a run's folder can hold."""

_CHANGEABLE = ("dataset", "case", "epochs")
"""What does not make it another run: images may move, which a fingerprint of them tells, and more
epochs extend it."""

_NEEDED = ("train_loss", "test_accuracy", "seconds")  # of every line, by what reads them


def final_accuracy(history: Sequence[Metrics]) -> float:
    """Return the accuracy to report: the mean over the last five epochs, or over fewer if there are
    no more, and never the best one.
    """
    last = history[-5:]
    return sum(metrics["test_accuracy"] for metrics in last) / len(last)


class RunError(Exception):
    """Something that the user can put right; the message says what and how."""


class DivergedError(RunError):
    """The loss or a weight became infinite or not a number."""


FailureKind = Literal["diverged", "failed"]


def error_message(error: Exception) -> str:
    """Return an error's message, and its kind if it is not one that is meant for users."""
    meant = isinstance(error, (DataError, RunError))
    return str(error) if meant else f"{type(error).__name__}: {error}"


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place, then put it there: a reader sees the old or the new.

    Raises:
        RunError: it cannot be written; what was there before is untouched.
    """
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise RunError(
            f"cannot write {file}: {error.strerror}. What was saved before is intact: "
            "solve that, then run the same command to resume"
        ) from error


def _lock(stream: IO[str]) -> None:
    """Take the lock, at the second attempt if need be: who asks for it holds it for a moment."""
    if sys.platform != "win32":
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the options of private training among them."""
    private = record.get("private")
    options = private.items() if isinstance(private, dict) else ()
    whether = {"private": private is not None}
    return {**record, **whether, **{f"private {name}": value for name, value in options}}


class RunFolder:
    """The folder of one run.

    ``config.yaml``
        the configuration under ``run``, then what was found: ``classes``, ``image_shape``,
        ``standardise`` (mean and deviation of the training images, if used), ``environment``.
    ``metrics.jsonl``
        one line per finished epoch.
    ``last.ckpt``
        the state of training, to go on from; its ``model`` is what :func:`evaluate` reports.
    ``best.ckpt``
        the weights with the best test accuracy, for use: having been chosen on the test images,
        their accuracy is not a result.
    ``failure.json``
        why the last attempt ended before its time: ``kind``, which is ``"diverged"`` or
        ``"failed"``, and ``message``. It goes when the run is begun again.
    ``.lock``
        an empty file, which the process that trains holds.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def read_config(self) -> dict[str, Any]:
        """Return what ``config.yaml`` holds.

        Raises:
            RunError: the file is not there, or is not a run's.
        """
        file = self.path / "config.yaml"
        if not self.path.is_dir():
            raise RunError(f"there is no folder {self.path}")
        if not file.exists():
            runs = sorted(place.parent.name for place in self.path.glob("*/config.yaml"))
            within = f", but {len(runs)} of them in it, such as {runs[0]}" if runs else ""
            raise RunError(f"{self.path} is not the folder of a run: it has no config.yaml{within}")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"{file} is not valid YAML"
            raise RunError(f"{self.path} is not the folder of a run: {reason}") from error
        if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
            raise RunError(f"{self.path} is not the folder of a run: {file} has no section 'run'")
        return content

    def write_config(self, content: Mapping[str, Any]) -> None:
        """Write ``config.yaml``."""
        write_whole(
            self.path / "config.yaml", yaml.safe_dump(dict(content), sort_keys=False).encode()
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in the folder, on systems that have such locks.

        Raises:
            RunError: another process does, or the folder cannot be written to.
        """
        file = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = file.open("a")
        except OSError as error:
            raise RunError(f"cannot write {file}: {error.strerror}") from error
        with stream:
            try:
                _lock(stream)
            except BlockingIOError as error:
                raise RunError(f"another process trains in {self.path}") from error
            except OSError:  # a file system without locks
                pass
            for part in self.path.glob("*.part"):  # of processes that were killed
                part.unlink(missing_ok=True)
            yield

    def is_locked(self) -> bool:
        """Tell whether a process trains in the folder, on systems that have such locks."""
        try:
            with (self.path / ".lock").open() as stream:
                if sys.platform != "win32":
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no such file, or a file system without locks
            pass
        return False

    @contextmanager
    def attempt(self, record: Mapping[str, Any]) -> Iterator[None]:
        """Hold the lock, and write ``failure.json`` if an error ends the run.

        Args:
            record: the configuration's fields.

        Raises:
            RunError: as :meth:`lock`.
        """
        with self.lock():
            (self.path / "failure.json").unlink(missing_ok=True)
            try:
                yield
            except Exception as error:
                kind: FailureKind = "diverged" if isinstance(error, DivergedError) else "failed"
                with suppress(RunError):  # the disk may be full
                    self.write_failure(kind, error_message(error), record)
                raise

    def read_failure(self) -> dict[str, str] | None:
        """Return what ``failure.json`` holds; ``None`` where there is no such file.

        Raises:
            RunError: it is damaged.
        """
        file = self.path / "failure.json"
        if not file.exists():
            return None
        try:
            failure = json.loads(file.read_bytes())
            found = {name: str(failure[name]) for name in ("kind", "message")}
        except (LookupError, TypeError, ValueError):
            found = {"kind": "none"}
        if found["kind"] not in get_args(FailureKind):
            raise RunError(f"{file} must have a kind, 'diverged' or 'failed', and a message")
        return found

    def write_failure(self, kind: FailureKind, message: str, record: Mapping[str, Any]) -> None:
        """Write ``failure.json``, and ``config.yaml`` if the run did not come to that.

        Args:
            kind: ``"diverged"``, which is a result, or ``"failed"``.
            message: what has happened.
            record: the configuration's fields.
        """
        if not (self.path / "config.yaml").exists():
            self.write_config({"run": dict(record)})
        failure = {"kind": kind, "message": message}
        write_whole(self.path / "failure.json", f"{json.dumps(failure)}\n".encode())

    def check(self, record: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Check that nothing was trained in the folder, or the run with this configuration.

        Args:
            record: the configuration's fields.
            defaults: those that have a default value; a folder may be older than a field.

        Raises:
            RunError: it is another run's, or holds a checkpoint of nobody knows what.
        """
        if not (self.path / "last.ckpt").exists():
            self._check_is_free()  # nothing was trained
            return
        if not (self.path / "config.yaml").exists():
            raise RunError(f"{self.path} has a checkpoint but no config.yaml: give another --out")
        there = {**defaults, **self.read_config()["run"]}
        before, now = (_flat(fields) for fields in (there, record))
        differing = [
            f"{key} is {before.get(key)!r} there and {now.get(key)!r} here"
            for key in {**now, **before}
            if before.get(key) != now.get(key) and key not in _CHANGEABLE
        ]
        if differing:
            raise RunError(
                f"{self.path} holds another run: {'; '.join(differing)}. "
                "Give another --out, or the options of that run to go on with it"
            )
        epochs, more = there.get("epochs"), record.get("epochs")
        if epochs == more or not isinstance(epochs, int) or not isinstance(more, int):
            return
        if more < epochs:
            raise RunError(
                f"{self.path} holds a run of {epochs} epochs, more than {more}: a run can only be "
                "extended. Give another --out"
            )
        if record.get("private"):
            raise RunError(
                f"{self.path} holds a private run of {epochs} epochs, whose noise was chosen such "
                f"that they spend its epsilon: it cannot be extended to {more}. Give another "
                f"--out, to train anew with the noise for {more} epochs"
            )
        if record.get("schedule") == "cosine":
            raise RunError(
                f"{self.path} holds a run of {epochs} epochs whose learning rate has fallen to "
                f"zero along a cosine: it cannot be extended. Give another --out, and "
                f"--init-from {self.path}"
            )

    def _check_is_free(self) -> None:
        """Check that the folder holds nothing but what a run writes."""
        if not self.path.is_dir():
            return
        strange = sorted(
            place.name
            for place in self.path.iterdir()
            if place.name not in _FILES and place.suffix != ".part"
        )
        if strange:
            raise RunError(
                f"{self.path} is not empty and not the folder of a run: it has {strange[0]}. "
                "Give another --out"
            )

    def check_data(self, found: Mapping[str, Any]) -> None:
        """Check that the images are of the kind and number that ``config.yaml`` tells.

        Raises:
            RunError: they have changed since the run was begun.
        """
        there = self.read_config()
        differing = [key for key, value in found.items() if there.get(key, value) != value]
        told = [key for key in differing if not key.endswith("_fingerprint")]
        changed = [f"{key} was {there[key]!r} and is {found[key]!r}" for key in told] or [
            f"the {key.replace('train', 'training').removesuffix('_fingerprint')} images are "
            "others, or in another order"
            for key in differing
        ]
        if changed:
            raise RunError(
                f"the data of {self.path} has changed: {'; '.join(changed)}. "
                "Restore it, or train on what is there now in another --out"
            )

    def read_metrics(self) -> list[Metrics]:
        """Return the lines of ``metrics.jsonl``; none where there is no such file.

        Raises:
            RunError: a line is damaged.
        """
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        history: list[Metrics] = []
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                metrics = json.loads(line)
                whole = all(math.isfinite(metrics[name]) for name in _NEEDED)
            except (LookupError, TypeError, ValueError):
                whole = False
            if not whole:
                raise RunError(
                    f"{file}, line {number}, must have numbers for {', '.join(_NEEDED)}. "
                    "Delete the file: training resumes from last.ckpt, and writes it anew"
                )
            history.append(metrics)
        return history

    def write_metrics(self, history: Sequence[Metrics]) -> None:
        """Write ``metrics.jsonl``."""
        lines = "".join(f"{json.dumps(metrics)}\n" for metrics in history)
        write_whole(self.path / "metrics.jsonl", lines.encode())

    def write_tensorboard(self, metrics: Metrics) -> None:
        """Add an epoch to TensorBoard's files, in the folder ``tensorboard``."""
        from torch.utils.tensorboard import SummaryWriter

        epoch = int(metrics["epoch"])
        with SummaryWriter(self.path / "tensorboard", purge_step=epoch) as writer:
            for name, value in metrics.items():
                if name != "epoch":
                    writer.add_scalar(name, value, epoch)

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; its ``model`` in contiguous tensors, as other formats need them."""
        state = {**state, "model": {name: x.contiguous() for name, x in state["model"].items()}}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.path / name, buffer.getbuffer())

    def load(self, name: str) -> dict[str, Any] | None:
        """Return a checkpoint, on the CPU; ``None`` where there is no such file.

        Raises:
            RunError: the file cannot be read.
        """
        file = self.path / name
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in every layer of the reader
            raise RunError(
                f"{file} is damaged ({type(error).__name__} while reading it). Restore it, or "
                "delete it to start from the beginning"
            ) from error
        return state
