"""The folder of a run and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from kernelnorm.experiments.errors import BusyError, DivergedError, RunError, error_message
from kernelnorm.experiments.files import Lock, remove_parts, write_atomically
from kernelnorm.experiments.saved import load_checked, save_atomically

__all__ = ["FailureKind", "Metrics", "RunFolder", "final_accuracy"]

Metrics = dict[str, float]
"""One line of ``metrics.jsonl``; accuracies are fractions."""

FailureKind = Literal["diverged", "failed"]

_NEEDED = ("train_loss", "test_accuracy", "seconds")  # every line must have these


def final_accuracy(history: Sequence[Metrics]) -> float:
    """Return the accuracy to report: the mean over the last five epochs, or over all if there are
    fewer.
    """
    last = history[-5:]
    return sum(metrics["test_accuracy"] for metrics in last) / len(last)


def resumed(
    content: Mapping[str, Any], record: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of ``config.yaml`` for a run that resumes.

    Args:
        content: what the file holds.
        record: the configuration, which may have more epochs and another folder of images.
        environment: versions and device of this process.
    """
    before = content["run"]
    changed: dict[str, Any] = {"run": {**record, "case": before["case"]}}
    if before["epochs"] != record["epochs"]:
        extension = {"after": before["epochs"], "to": record["epochs"]}
        changed["extended"] = [*content.get("extended", []), extension]
    if environment not in environments(content):
        changed["later_environments"] = [*content.get("later_environments", []), environment]
    return {**content, **changed}


def environments(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the environments in ``config.yaml``: of the first process, and of later ones."""
    later = content.get("later_environments")
    found = [content.get("environment"), *(later if isinstance(later, list) else [])]
    return [environment for environment in found if isinstance(environment, Mapping)]


class _Loader(yaml.SafeLoader):
    """Refuses aliases, with which a file of a few lines can take gigabytes of memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


class RunFolder:
    """The folder of one run.

    ``config.yaml``
        the configuration under ``run``, then facts about the images and the machine: ``classes``,
        ``image_shape``, ``standardise`` (mean and deviation, if used), ``environment``,
        ``later_environments`` (if the run resumed elsewhere), and others.
    ``metrics.jsonl``
        one line per finished epoch.
    ``last.ckpt``
        the state of training, from which the run resumes; :func:`evaluate` tests its ``model``.
    ``best.ckpt``
        the weights with the best test accuracy, for use. They were chosen on the test images, so
        their accuracy is not a result.
    ``failure.json``
        why the last attempt ended early: ``kind``, which is ``"diverged"`` or ``"failed"``, and
        ``message``. It is removed when the run starts again.
    ``.lock``
        an empty file, which the process that trains keeps locked.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def read_config(self) -> dict[str, Any]:
        """Return the content of ``config.yaml``.

        Raises:
            RunError: the file is missing, or is not a run's.
        """
        file = self.path / "config.yaml"
        if not self.path.is_dir():
            raise RunError(
                f"there is no folder {self.path}: give the folder of a run, such as runs/CASE/NAME"
            )
        if not file.exists():
            runs = sorted(place.parent.name for place in self.path.glob("*/config.yaml"))
            within = f", but it has run folders ({len(runs)}), such as {runs[0]}" if runs else ""
            raise RunError(f"{self.path} is not the folder of a run: it has no config.yaml{within}")
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            unread = f"{file} is not valid YAML without aliases"
            reason = getattr(error, "strerror", None) or unread
            raise RunError(f"{self.path} is not the folder of a run: {reason}") from error
        if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
            raise RunError(f"{self.path} is not the folder of a run: {file} has no section 'run'")
        return content

    def write_config(self, content: Mapping[str, Any]) -> None:
        """Write ``config.yaml``."""
        write_atomically(
            self.path / "config.yaml", yaml.safe_dump(dict(content), sort_keys=False).encode()
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in the folder, on systems that have such locks.

        Raises:
            BusyError: another process trains in the folder.
            RunError: the folder is not writable.
        """
        lock = Lock(self.path / ".lock")
        with ExitStack() as stack:
            try:
                held = stack.enter_context(lock.hold())
            except BlockingIOError as error:
                raise BusyError(f"another process trains in {self.path}") from error
            except OSError as error:
                raise RunError(f"cannot write {lock.file}: {error.strerror}") from error
            if held:  # without a lock another process may still be writing them
                remove_parts(self.path)
            yield

    def is_locked(self) -> bool:
        """Tell whether a process trains in the folder, on systems that have such locks."""
        return Lock(self.path / ".lock").is_held()

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
        """Return the content of ``failure.json``; ``None`` if there is no such file.

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
        """Write ``failure.json``, and ``config.yaml`` if the run ended before it wrote that.

        Args:
            kind: ``"diverged"``, which is a result, or ``"failed"``.
            message: what has happened.
            record: the configuration's fields.
        """
        if not (self.path / "config.yaml").exists():
            self.write_config({"run": dict(record)})
        failure = {"kind": kind, "message": message}
        write_atomically(self.path / "failure.json", f"{json.dumps(failure)}\n".encode())

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
                numbers = [metrics[name] for name in _NEEDED] + [*metrics.values()]
                whole = all(map(math.isfinite, numbers)) and 0 <= metrics["test_accuracy"] <= 1
            except (LookupError, OverflowError, TypeError, ValueError):
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
        write_atomically(self.path / "metrics.jsonl", lines.encode())

    def write_tensorboard(self, metrics: Metrics) -> None:
        """Add an epoch to TensorBoard's files, in the folder ``tensorboard``."""
        from torch.utils.tensorboard import SummaryWriter

        epoch = int(metrics["epoch"])
        with SummaryWriter(self.path / "tensorboard", purge_step=epoch) as writer:
            for name, value in metrics.items():
                if name != "epoch":
                    writer.add_scalar(name, value, epoch)

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; makes the tensors of ``model`` contiguous, as other formats need."""
        state = {**state, "model": {name: x.contiguous() for name, x in state["model"].items()}}
        save_atomically(self.path / name, state)

    def load(self, name: str) -> dict[str, Any] | None:
        """Return a checkpoint, on the CPU; ``None`` where there is no such file.

        Raises:
            RunError: the file cannot be read.
        """
        file = self.path / name
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = load_checked(file)
        except Exception as error:  # a damaged file can fail in every layer of the reader
            raise RunError(
                f"{file} is damaged ({type(error).__name__} while reading it). Restore it, or "
                "delete it to start from the beginning"
            ) from error
        if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
            raise RunError(
                f"{file} is no checkpoint of a run. Restore it, or delete it to start from the "
                "beginning"
            )
        return state
