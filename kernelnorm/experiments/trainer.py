"""Training: one loop, which resumes where it was stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from tqdm import tqdm

from kernelnorm.experiments import state
from kernelnorm.experiments.data import Augment, Images, Preprocess, batches, steps_per_epoch
from kernelnorm.experiments.evaluation import describe, load_split, measure
from kernelnorm.experiments.launch import (
    Launch,
    check_shares,
    environment,
    make_fabric,
    over_processes,
    share,
)
from kernelnorm.experiments.recipes import RunConfig
from kernelnorm.experiments.runs import DivergedError, Metrics, RunError, RunFolder
from kernelnorm.experiments.state import Progress
from kernelnorm.experiments.style import LABELS
from kernelnorm.experiments.trained import build_network, read_weights, start_from

__all__ = ["train"]

_SLOW_LOOKS = 2
"""A process starts up, fills its caches and compiles before it has looked at the loss so often."""


def train(
    config: RunConfig, launch: Launch | None = None, on_epoch: Callable[[], object] | None = None
) -> RunFolder:
    """Train a network, or go on with its training, and return the run's folder.

    A stopped run resumes from its last checkpoint; on one CPU its weights are then bit for bit
    those of a run that was not stopped. With more epochs than before a finished run is extended
    likewise; otherwise it is left as it is.

    Args:
        config: what to train, from :func:`kernelnorm.experiments.recipes.configure`.
        launch: where and how.
        on_epoch: is called as each epoch ends.

    Raises:
        DivergedError: the loss or a weight is not finite.
        RunError: the folder holds another run, or another process trains in it, a checkpoint is
            damaged, a file cannot be written, or the device is not there.
        DataError: images are missing or damaged.
    """
    launch = launch or Launch()
    folder = RunFolder(launch.out or Path("runs") / config.case / config.name)
    folder.check(config.record(), config.defaults())
    history = folder.read_metrics()
    if config.finished(history) and (folder.path / "last.ckpt").exists():
        if launch.verbose:
            epochs = "1 epoch" if len(history) == 1 else f"{len(history)} epochs"
            rank_zero_only(print)(f"{folder.path} is finished, after {epochs}.")
        return folder
    with torch.device("meta"):  # a wrong option is found before anything is written
        build_network(config, num_classes=10, in_channels=3)
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    with folder.attempt(config.record()) if first else nullcontext():
        _Training(config, launch, folder).run(on_epoch)
    return folder


class _Training:
    def __init__(self, config: RunConfig, launch: Launch, folder: RunFolder) -> None:
        self.config, self.launch, self.folder = config, launch, folder
        self.fabric = fabric = make_fabric(
            launch.accelerator, devices=launch.devices, precision=config.precision
        )
        check_shares(fabric, config.norm, config.batch_size)
        fabric.launch()
        with fabric.rank_zero_first():  # the others find the data downloaded
            self.train_images = load_split(config, "train", launch.data_dir)
            self.test_images = load_split(config, "test", launch.data_dir)
        _check_images(self.train_images, self.test_images)
        self.preprocess = Preprocess()
        if config.standardise and config.norm != "kernel":
            self.preprocess = Preprocess.standardise(self.train_images)
        self.batches: dict[str, Any] = {
            "batch_size": config.batch_size // fabric.world_size,
            "train": True,
            "rank": fabric.global_rank,
            "world_size": fabric.world_size,
        }
        self.steps = steps_per_epoch(len(self.train_images), **self.batches)
        if not self.steps:
            raise RunError(f"{len(self.train_images)} training images are too few for a batch")

        torch.manual_seed(config.seed)
        self.network = build_network(
            config,
            num_classes=len(self.train_images.classes),
            in_channels=self.train_images.pixels.shape[1],
        )
        self._start_from_weights()
        self.network = share(fabric, self.network, config.seed)
        if launch.compile:
            torch.compiler.reset()  # PyTorch does not compile the same function without end
            graphs = fabric.device.type == "cuda" and fabric.world_size == 1
            # Batches have two sizes, the last being smaller.
            self.network.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
        self.model, self.optimizer = fabric.setup(self.network, _optimizer(self.network, config))
        self.max_steps = math.inf if launch.max_steps is None else launch.max_steps
        # A look at the loss waits for the device: free on a CPU, and rare elsewhere.
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
        if fresh and self.launch.verbose:
            names = ", ".join(fresh)
            self.fabric.print(f"begun from {source}, but for {names}: another number of classes")

    def run(self, on_epoch: Callable[[], object] | None = None) -> None:
        """Train epoch by epoch, until the end or ``max_steps``."""
        self._write_config()
        self.progress = state.restore(self.folder, self.fabric, self.network, self.optimizer)
        self.intact = str(self.progress) if self.progress else ""
        if self.launch.verbose:
            self.fabric.print(self._plan())
        with self._bar() as self.bar:
            while not self.config.finished(self.progress.history):
                if not self._train_epoch():
                    self._pause()
                    return
                self._end_epoch()
                if on_epoch is not None:
                    on_epoch()

    def _plan(self) -> str:
        """Return in a line what is trained."""
        if self.intact:
            return f"resuming {self.folder.path} after {self.progress}"
        config, (channels, height, width) = self.config, self.train_images.pixels.shape[1:]
        colour = "grey" if channels == 1 else "colour"
        return (
            f"training {config.model} with {LABELS[config.norm]}: "
            f"{len(self.train_images):,} {colour} images of {width}x{height} pixels, "
            f"{len(self.train_images.classes)} classes, batch size {config.batch_size}, "
            f"at most {config.epochs} epoch{'s' * (config.epochs > 1)}; "
            f"{len(self.test_images):,} test images"
        )

    def _train_epoch(self) -> bool:
        """Take the steps of one epoch; tell whether it was to its end."""
        progress, config = self.progress, self.config
        epoch = len(progress.history)
        self.bar.set_description(
            f"{config.norm} b{config.batch_size} epoch {epoch + 1}/{config.epochs}"
        )
        self.clock = self.saved = time.perf_counter()
        pending: list[tuple[Tensor, int]] = []
        for x, y in batches(
            self.train_images,
            **self.batches,
            seed=config.seed,
            epoch=epoch,
            start_step=progress.step,
            augment=Augment() if config.augment else None,
            preprocess=self.preprocess,
            device=self.fabric.device,
        ):
            if epoch * self.steps + progress.step >= self.max_steps:
                break
            if self.launch.compile:
                torch.compiler.cudagraph_mark_step_begin()  # the last step's tensors are done with
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr_at(epoch + progress.step / self.steps, 1 / self.steps)
            logits = self._forward(x)
            loss = F.cross_entropy(logits, y)
            self.fabric.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

            correct = (logits.argmax(1) == y).sum()
            pending.append((torch.stack([loss.detach() * len(y), correct]), len(y)))
            progress.step += 1
            if len(pending) == self.look_every:
                self._look(pending)
                self._save_if_due()
        self._look(pending)
        self._check_weights()
        return progress.step == self.steps

    def _forward(self, x: Tensor) -> Tensor:
        try:
            return self.model(x.to(memory_format=torch.channels_last))  # type: ignore[no-any-return]
        except (RuntimeError, ValueError) as error:
            config, problem = self.config, str(error)
            too_small = "too small" in problem or "greater than actual input size" in problem
            if isinstance(error, RuntimeError) and not too_small:
                raise  # such as too little memory
            raise RunError(
                f"{config.model} with norm {config.norm} cannot train on batches of shape "
                f"{tuple(x.shape)}: {error}. Try a larger --image-size or --batch-size"
            ) from error

    def _look(self, pending: list[tuple[Tensor, int]]) -> None:
        """Add the steps since the last look to the sums, and stop at a loss that is not finite."""
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
            self.bar.update(images * world_size)
        now = time.perf_counter()
        sums.seconds += now - self.clock
        if self.looks < _SLOW_LOOKS:
            sums.slow_seconds += now - self.clock
            sums.slow_images += world_size * sum(images for _, images in pending)
        self.looks += 1
        self.clock = now
        pending.clear()
        self.bar.set_postfix(
            loss=f"{sums.loss / sums.images:.3f}",
            accuracy=f"{sums.correct / sums.images:.1%}",
            refresh=False,
        )

    def _check_weights(self) -> None:
        """Stop at a weight that is not finite: the loss of a step is from before its update."""
        finite = [parameter.isfinite().all() for parameter in self.network.parameters()]
        if not torch.stack(finite).all():
            raise self._diverged("a weight is not finite", self.progress.step)

    def _diverged(self, problem: str, step: int) -> DivergedError:
        config = self.config
        precision = "" if config.precision == "32-true" else " or --precision 32-true"
        saved = f"last.ckpt, after {self.intact}, is intact" if self.intact else "Nothing was saved"
        return DivergedError(
            f"{problem} at epoch {len(self.progress.history) + 1}, step {step} of {self.steps}: "
            f"training has diverged. Try an --lr below {config.lr:g}{precision}. {saved}"
        )

    def _end_epoch(self) -> None:
        """Test the network, write down the epoch, and save."""
        history, sums = self.progress.history, self.progress.sums
        loss, accuracy = measure(self.network, self.test_images, self.preprocess, self.fabric)
        if not math.isfinite(loss):
            raise self._diverged(f"the test loss is {loss}", self.progress.step)
        metrics = {
            "epoch": len(history) + 1,
            "train_loss": sums.loss / sums.images,
            "train_accuracy": sums.correct / sums.images,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": sums.images / sums.images_per_second,
            "images_per_second": sums.images_per_second,
            "startup_seconds": max(0.0, sums.seconds - sums.images / sums.images_per_second),
        }
        is_best = all(accuracy > earlier["test_accuracy"] for earlier in history)
        self.progress = Progress(history=[*history, metrics])
        if is_best and self.fabric.is_global_zero:
            best = {"model": self.network.state_dict(), "epoch": metrics["epoch"]}
            self.folder.save("best.ckpt", best)
        self._save()
        self._report(metrics)

    def _report(self, metrics: Metrics) -> None:
        if not self.fabric.is_global_zero:
            return
        if self.launch.tensorboard:
            self.folder.write_tensorboard(metrics)
        if self.launch.verbose:
            losses = "train loss {train_loss:.4f}, test loss {test_loss:.4f}"
            accuracies = "train accuracy {train_accuracy:.2%}, test accuracy {test_accuracy:.2%}"
            speed = "{seconds:.1f} s, {images_per_second:,.0f} images/s"
            line = f"epoch {{epoch}}/{self.config.epochs}: {losses}; {accuracies}; {speed}"
            tqdm.write(line.format(**metrics))

    def _pause(self) -> None:
        self._save()
        sums = self.progress.sums
        if sums.images and self.fabric.is_global_zero:
            tqdm.write(
                f"paused after {self.launch.max_steps} steps: train loss "
                f"{sums.loss / sums.images:.4f}, accuracy {sums.correct / sums.images:.2%}, "
                f"{sums.images_per_second:,.0f} images/s. Run it without --max-steps to resume."
            )

    def _save_if_due(self) -> None:
        due = time.perf_counter() - self.saved >= 60 * self.launch.checkpoint_minutes
        if self.fabric.broadcast(due):
            self._check_weights()
            self._save()
            self.clock = self.saved = time.perf_counter()

    def _save(self) -> None:
        state.save(self.folder, self.fabric, self.network, self.optimizer, self.progress)
        self.intact = str(self.progress)

    def _write_config(self) -> None:
        """Write what the run is, or what has changed of it since: the place of images, epochs."""
        found = describe(train=self.train_images, test=self.test_images)
        content: dict[str, Any] = {}
        if (self.folder.path / "config.yaml").exists():
            self.folder.check_data(found)
            content = self.folder.read_config()
        record = self.config.record()
        if (self.folder.path / "last.ckpt").exists():
            before = content["run"]
            if before == record:
                return
            if before["epochs"] != record["epochs"]:
                extension = {"after": before["epochs"], "to": record["epochs"]}
                content["extended"] = [*content.get("extended", []), extension]
            content = {**content, "run": {**record, "case": before["case"]}}
        else:
            mean, std = self.preprocess.mean, self.preprocess.std
            content = {
                "run": record,
                **found,
                "standardise": mean and std and {"mean": [*mean], "std": [*std]},
                "environment": environment(self.fabric),
            }
        if self.fabric.is_global_zero:
            self.folder.write_config(content)

    def _bar(self) -> tqdm[Any]:
        """Return the bar of the whole run, so that its time left is the run's."""
        images, progress = len(self.train_images), self.progress
        return tqdm(
            total=self.config.epochs * images,
            initial=len(progress.history) * images + progress.sums.images,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {remaining} left{postfix}",
            dynamic_ncols=True,
            leave=False,
            disable=None if self.fabric.is_global_zero else True,  # None: off where no one looks
        )


def _optimizer(network: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    decay = config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=decay)
    return torch.optim.SGD(
        network.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=decay
    )


def _check_images(train: Images, test: Images) -> None:
    """Refuse a single class, and test images of another size, before anything is trained."""
    if len(train.classes) < 2:
        raise RunError(
            f"the images have only one class, {train.classes[0]!r}: a network needs two to tell "
            "apart. Put the images of each class into a folder of its own"
        )
    sizes = [f"{images.pixels.shape[3]}x{images.pixels.shape[2]}" for images in (train, test)]
    if sizes[0] != sizes[1]:
        raise RunError(
            f"the training images are {sizes[0]} pixels in size, the test images {sizes[1]}: bring "
            "them to one size with --image-size"
        )
