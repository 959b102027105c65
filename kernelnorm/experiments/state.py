"""The state of training: all that a run needs to resume as if it had never stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor

from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.runs import Metrics, RunFolder
from kernelnorm.experiments.steps import Steps

__all__ = ["Progress", "Sums", "restore", "save"]

T = TypeVar("T")


@dataclass
class Sums:
    """Running sums over the images of an epoch, of all processes.

    ``slow_images`` and ``slow_seconds`` belong to the first steps of a process, in which it starts
    up, fills caches and compiles.
    """

    loss: float = 0.0
    correct: float = 0.0
    images: int = 0
    seconds: float = 0.0
    slow_images: int = 0
    slow_seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """The speed without the first steps; with them if there are no others."""
        images, seconds = self.images - self.slow_images, self.seconds - self.slow_seconds
        return images / seconds if images and seconds > 0 else self.images / self.seconds


@dataclass
class Progress:
    """How far a run has come: ``step`` steps into epoch ``len(history)``."""

    history: list[Metrics] = field(default_factory=list)
    step: int = 0
    sums: Sums = field(default_factory=Sums)

    def __bool__(self) -> bool:
        """Tell whether the run has taken a step."""
        return bool(self.history or self.step)

    def __str__(self) -> str:
        epochs = len(self.history)
        inside = self.step or not epochs
        return f"step {self.step} of epoch {epochs + 1}" if inside else f"epoch {epochs}"


def save(folder: RunFolder, fabric: Fabric, steps: Steps[Any], progress: Progress) -> None:
    """Write ``last.ckpt``, ``best.ckpt`` if it is due, and a readable part as ``metrics.jsonl``.

    In this order ``best.ckpt`` never has weights of steps that ``last.ckpt`` does not know, and a
    run that ``metrics.jsonl`` calls finished has all of its files.
    """
    rng = _of_all(fabric, _rng(fabric))
    if fabric.is_global_zero:
        state = {
            "model": steps.evaluated.state_dict(),
            **steps.state_dict(),
            "scaler": fabric.strategy.precision.state_dict(),
            "progress": asdict(progress),
            "rng": rng,
        }
        folder.save("last.ckpt", state)
        _save_best(folder, state["model"], progress)
        folder.write_metrics(progress.history)
    fabric.barrier()


def _save_best(folder: RunFolder, weights: dict[str, Tensor], progress: Progress) -> None:
    """Write ``best.ckpt`` if an epoch has just ended with the highest test accuracy so far."""
    accuracies = [metrics["test_accuracy"] for metrics in progress.history]
    if not progress.step and accuracies and accuracies[-1] > max(accuracies[:-1], default=-1):
        folder.save("best.ckpt", {"model": weights, "epoch": len(accuracies)})


def restore(folder: RunFolder, fabric: Fabric, steps: Steps[Any]) -> Progress:
    """Load the state in ``last.ckpt``, if there is one, and return the progress.

    Raises:
        RunError: the file is damaged, does not fit the run, is of another number of processes, or
            is not visible to all processes.
    """
    state = folder.load("last.ckpt")
    progress = Progress() if state is None else _take_up(state, folder, fabric, steps)
    here = len(progress.history), progress.step
    if any(there != here for there in _of_all(fabric, here)):
        raise RunError(
            f"the processes have found different states of the run in {folder.path}: "
            "it must be on a file system that all of them share"
        )
    # A process may have been killed after writing last.ckpt and before the other files.
    if fabric.is_global_zero and state is not None:
        _save_best(folder, state["model"], progress)
        if folder.read_metrics() != progress.history:
            folder.write_metrics(progress.history)
    fabric.barrier()
    return progress


def _take_up(
    state: dict[str, Any], folder: RunFolder, fabric: Fabric, steps: Steps[Any]
) -> Progress:
    """Load the state into the steps, the precision and the random generators."""
    try:
        world_size = len(state["rng"])
        if world_size != fabric.world_size:
            raise RunError(
                f"{folder.path} was started with {world_size} processes and can resume only with "
                f"{world_size}, not {fabric.world_size}"
            )
        steps.load_state_dict(state)
        fabric.strategy.precision.load_state_dict(state["scaler"])
        rng = state["rng"][fabric.global_rank]
        torch.set_rng_state(rng["cpu"])
        if fabric.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], fabric.device)
        progress: dict[str, Any] = state["progress"]
        return Progress(progress["history"], progress["step"], Sums(**progress["sums"]))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder.path / 'last.ckpt'} does not fit this run ({error}). It may be another "
            "version's: delete it to start from the beginning"
        ) from error


def _rng(fabric: Fabric) -> dict[str, Tensor]:
    """Return the states of the random generators."""
    own = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(fabric.device)
    return own


def _of_all(fabric: Fabric, own: T) -> list[T]:
    """Return the value ``own`` of each process, by rank."""
    if fabric.world_size == 1:
        return [own]
    every: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(every, own)
    return every
