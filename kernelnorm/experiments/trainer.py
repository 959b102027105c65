"""Training: one loop, which resumes where it was stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from kernelnorm.experiments import state
from kernelnorm.experiments.checks import check_config, check_data
from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.console import Bar, epoch_line, pause_line, start_line
from kernelnorm.experiments.errors import DivergedError, RunError, to_install
from kernelnorm.experiments.evaluation import measure
from kernelnorm.experiments.inputs import (
    ImageCheck,
    check_splits,
    describe_images,
    load_split,
    make_preprocess,
)
from kernelnorm.experiments.launch import (
    Launch,
    check_precision,
    check_shares,
    environment,
    make_fabric,
    over_processes,
    share,
)
from kernelnorm.experiments.networks import build_network, read_weights, start_from
from kernelnorm.experiments.runs import RunFolder, resumed
from kernelnorm.experiments.state import Progress
from kernelnorm.experiments.steps import Material, PlainSteps, Steps

__all__ = ["train"]

_SLOW_LOOKS = 2
"""How many of the first readings of the loss ``images_per_second`` leaves out: start-up."""


def train(
    config: RunConfig, launch: Launch | None = None, on_epoch: Callable[[], object] | None = None
) -> RunFolder:
    """Train a network, or resume its training, and return the run's folder.

    A stopped run resumes from its last checkpoint; on one CPU, with the same number of threads, it
    ends with the weights of an uninterrupted run, bit for bit. A finished run is extended likewise
    if the configuration has more epochs than before; otherwise it is left as it is.

    Args:
        config: what to train, from :func:`kernelnorm.experiments.config.configure`.
        launch: where and how the run is executed.
        on_epoch: is called as each epoch ends.

    Raises:
        DivergedError: the loss or a weight is not finite.
        RunError: the folder holds another run, or another process trains in it, a checkpoint is
            damaged, a file cannot be written, the device is not available, or the options do not
            fit each other or the images.
        DataError: images are missing or damaged.
    """
    launch = launch or Launch()
    folder = RunFolder(launch.out or Path("runs") / config.case / config.name)
    check_config(folder, config)
    history = folder.read_metrics()
    if config.finished(history) and (folder.path / "last.ckpt").exists():
        ImageCheck(launch.data_dir)(folder, config)
        if launch.verbose:
            epochs = "1 epoch" if len(history) == 1 else f"{len(history)} epochs"
            rank_zero_only(print)(f"{folder.path} is finished, after {epochs}.")
        return folder
    with torch.device("meta"):  # a wrong option is found before anything is written
        network = build_network(config, num_classes=10, in_channels=3)
    if config.private is not None:
        _private().check(config, launch, network)
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    with folder.attempt(config.as_dict()) if first else nullcontext():
        check_config(folder, config)  # another process may have trained here meanwhile
        _Training(config, launch, folder).run(on_epoch)
    return folder


class _Training:
    def __init__(self, config: RunConfig, launch: Launch, folder: RunFolder) -> None:
        self.config, self.launch, self.folder = config, launch, folder
        self.fabric = fabric = make_fabric(
            launch.accelerator, devices=launch.devices, precision=config.precision
        )
        check_precision(fabric, config.precision)
        check_shares(fabric, config.norm, config.batch_size)
        fabric.launch()
        with fabric.rank_zero_first():  # the others find the data downloaded
            self.train_images = load_split(config, "train", launch.data_dir)
            self.test_images = load_split(config, "test", launch.data_dir)
        check_splits(self.train_images, self.test_images)
        self.preprocess = make_preprocess(config, self.train_images)

        torch.manual_seed(config.seed)
        self.network = build_network(
            config,
            num_classes=len(self.train_images.classes),
            in_channels=self.train_images.pixels.shape[1],
        )
        self._start_from_weights()
        self.network = share(fabric, self.network, config.seed)
        material = Material(
            config, fabric, self.network, self.train_images, self.preprocess, launch.compile
        )
        private = config.private is not None
        self.steps: Steps[Any] = (_private().PrivateSteps if private else PlainSteps)(material)
        self.max_steps = math.inf if launch.max_steps is None else launch.max_steps
        # A look at the loss waits for the device: free on a CPU, costly and so rare elsewhere.
        self.look_every = 1 if fabric.device.type == "cpu" else 32
        self.looks = 0

    def _start_from_weights(self) -> None:
        config, source = self.config, self.launch.init_from
        if not config.init_from or (self.folder.path / "last.ckpt").exists():
            return
        if source is None:
            raise RunError("the weights to start from are missing: give --init-from")
        weights = read_weights(source)
        if weights.fingerprint() != config.init_from:
            raise RunError(f"the weights in {source} have changed since the run was configured")
        fresh = start_from(weights, self.network, len(self.train_images.classes))
        if self.launch.verbose:
            names = f", except {', '.join(fresh)}: another number of classes" if fresh else ""
            self.fabric.print(f"started from {source}{names}")

    def run(self, on_epoch: Callable[[], object] | None = None) -> None:
        """Train epoch by epoch, until the end or ``max_steps``."""
        resumes, content = (self.folder.path / "last.ckpt").exists(), self._config()
        self.progress = state.restore(self.folder, self.fabric, self.steps)
        # Only now: a run that cannot resume stays as it is.
        if self.fabric.is_global_zero and not (resumes and content == self.folder.read_config()):
            self.folder.write_config(content)
        self.last_saved = str(self.progress) if self.progress else ""
        if self.launch.verbose:
            resumed = f"resuming {self.folder.path} after {self.progress}"
            begun = start_line(self.config, self.train_images, self.test_images)
            self.fabric.print(resumed if self.last_saved else begun)
        disable = None if self.fabric.is_global_zero else True
        with Bar(self.config, self.steps.per_epoch, self.progress, disable) as self.bar:
            while not self.config.finished(self.progress.history):
                if not self._train_epoch():
                    self._pause()
                    return
                self._end_epoch()
                if on_epoch is not None:
                    on_epoch()

    def _train_epoch(self) -> bool:
        """Take the steps of one epoch; return whether it was completed."""
        progress, config = self.progress, self.config
        epoch = len(progress.history)
        self.bar.begin_epoch(epoch)
        self.clock = self.saved = time.perf_counter()
        pending: list[tuple[Tensor, int]] = []
        for batch in self.steps.batches(epoch, progress.step):
            if epoch * self.steps.per_epoch + progress.step >= self.max_steps:
                break
            time_ = epoch + progress.step / self.steps.per_epoch
            for group in self.steps.optimizer.param_groups:
                group["lr"] = config.lr_at(time_, 1 / self.steps.per_epoch)
            try:
                pending.append(self.steps.take(batch))
            except FloatingPointError as error:
                raise self._diverged(str(error), progress.step + 1) from error
            progress.step += 1
            if len(pending) == self.look_every:
                self._look(pending)
                self._save_if_due()
        self._look(pending)
        self._check_weights()
        return progress.step == self.steps.per_epoch

    def _look(self, pending: list[tuple[Tensor, int]]) -> None:
        """Add the steps since the last look to the sums; raise if a loss is not finite."""
        if not pending:
            return
        sums, world_size = self.progress.sums, self.fabric.world_size
        rows = over_processes(self.fabric, torch.stack([row for row, _ in pending])).tolist()
        first = self.progress.step - len(pending)
        for i, ((loss, correct), (_, images)) in enumerate(zip(rows, pending, strict=True)):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", first + i + 1)
            sums.loss += loss
            sums.correct += correct
            sums.images += images * world_size
        now = time.perf_counter()
        sums.seconds += now - self.clock
        if self.looks < _SLOW_LOOKS:
            sums.slow_seconds += now - self.clock
            sums.slow_images += world_size * sum(images for _, images in pending)
        self.looks += 1
        self.clock = now
        self.bar.show(len(pending), sums, self.steps.metrics())
        pending.clear()

    def _check_weights(self) -> None:
        """Raise if a weight is not finite; the loss of a step does not show what its update did."""
        finite = [parameter.isfinite().all() for parameter in self.network.parameters()]
        if not torch.stack(finite).all():
            raise self._diverged("a weight is not finite", self.progress.step)

    def _diverged(self, problem: str, step: int) -> DivergedError:
        config = self.config
        precision = "" if config.precision == "32-true" else " or --precision 32-true"
        last = self.last_saved
        saved = f"last.ckpt, after {last}, is intact" if last else "Nothing was saved"
        return DivergedError(
            f"{problem} at epoch {len(self.progress.history) + 1}, step {step} of "
            f"{self.steps.per_epoch}: training has diverged. Try an --lr below "
            f"{config.lr:g}{precision}. {saved}"
        )

    def _end_epoch(self) -> None:
        """Test the network, add the epoch's metrics to the history, and save."""
        history, sums = self.progress.history, self.progress.sums
        loss, accuracy = measure(
            self.steps.evaluated, self.test_images, self.preprocess, self.fabric
        )
        if not math.isfinite(loss):
            raise self._diverged(f"the test loss is {loss}", self.progress.step)
        metrics = {
            "epoch": len(history) + 1,
            "train_loss": sums.loss / sums.images,
            "train_accuracy": sums.correct / sums.images,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "lr": self.steps.optimizer.param_groups[0]["lr"],
            "seconds": sums.images / sums.images_per_second,
            "images_per_second": sums.images_per_second,
            "startup_seconds": max(0.0, sums.seconds - sums.images / sums.images_per_second),
            **self.steps.metrics(),
        }
        self.progress = Progress(history=[*history, metrics])
        self._save()
        if self.fabric.is_global_zero and self.launch.tensorboard:
            self.folder.write_tensorboard(metrics)
        if self.fabric.is_global_zero and self.launch.verbose:
            tqdm.write(epoch_line(self.config, metrics))

    def _pause(self) -> None:
        self._save()
        if self.fabric.is_global_zero:
            done = len(self.progress.history) * self.steps.per_epoch + self.progress.step
            tqdm.write(pause_line(done, self.progress.sums))

    def _save_if_due(self) -> None:
        due = time.perf_counter() - self.saved >= 60 * self.launch.checkpoint_minutes
        if self.fabric.broadcast(due):
            self._check_weights()
            self._save()
            self.clock = self.saved = time.perf_counter()

    def _save(self) -> None:
        state.save(self.folder, self.fabric, self.steps, self.progress)
        self.last_saved = str(self.progress)

    def _config(self) -> dict[str, Any]:
        """Return the content of ``config.yaml``, after a check of the images if a run resumes."""
        found = describe_images(train=self.train_images, test=self.test_images)
        record, where = self.config.as_dict(), environment(self.fabric, self.launch.compile)
        if (self.folder.path / "last.ckpt").exists():
            check_data(self.folder, found)
            return resumed(self.folder.read_config(), record, where)
        mean, std = self.preprocess.mean, self.preprocess.std
        return {
            "run": record,
            **found,
            "standardise": mean and std and {"mean": [*mean], "std": [*std]},
            **self.steps.record(),
            "environment": where,
        }


def _private() -> Any:
    """Return the module of private training, which needs Opacus.

    Raises:
        RunError: it is not installed.
    """
    try:
        from kernelnorm.experiments import private_steps
    except ModuleNotFoundError as error:
        raise RunError(f"private training needs {error.name}: {to_install('private')}") from error
    return private_steps
