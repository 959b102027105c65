"""Training: one loop, that goes on where it was stopped."""

from __future__ import annotations

import math
import platform
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from tqdm import tqdm

import kernelnorm
from kernelnorm.experiments import state
from kernelnorm.experiments.data import Augment, Preprocess, batches, steps_per_epoch
from kernelnorm.experiments.evaluation import build_network, load_split, measure
from kernelnorm.experiments.launch import Launch, make_fabric, over_processes
from kernelnorm.experiments.recipes import RunConfig
from kernelnorm.experiments.runs import DivergedError, Metrics, RunError, RunFolder
from kernelnorm.experiments.state import Progress

__all__ = ["train"]


def train(config: RunConfig, launch: Launch | None = None) -> RunFolder:
    """Train a network, or go on with its training, and return the run's folder.

    A run that was stopped, in whichever way, goes on from its last checkpoint; on one CPU its
    weights are then bit for bit those of a run that was not. A finished run is left as it is.

    Args:
        config: what to train, from :func:`kernelnorm.experiments.recipes.configure`.
        launch: where and how.

    Raises:
        DivergedError: the loss is not finite.
        RunError: the folder holds another run, a checkpoint is damaged, a file cannot be written,
            or the device is not there.
        DataError: images are missing or damaged.
    """
    launch = launch or Launch()
    if launch.tensorboard and find_spec("tensorboard") is None:
        raise RunError("--tensorboard needs: pip install 'kernelnorm[tensorboard]'")
    folder = RunFolder(launch.out or Path("runs") / config.case / config.name)
    folder.check(config.record())
    history = folder.read_metrics()
    if config.finished(history):
        if launch.verbose:
            rank_zero_only(print)(f"{folder.path} is finished, after {len(history)} epochs.")
    else:
        _Training(config, launch, folder).run()
    return folder


class _Training:
    def __init__(self, config: RunConfig, launch: Launch, folder: RunFolder) -> None:
        self.config, self.launch, self.folder = config, launch, folder
        self.fabric = fabric = make_fabric(
            launch.accelerator, devices=launch.devices, precision=config.precision
        )
        if config.batch_size % fabric.world_size:
            raise RunError(
                f"a batch of {config.batch_size} images cannot be shared out evenly over "
                f"{fabric.world_size} processes: change --batch-size or the number of processes"
            )
        fabric.launch()
        with fabric.rank_zero_first():  # the others find the data downloaded
            self.train_images = load_split(config, "train", launch.data_dir)
            self.test_images = load_split(config, "test", launch.data_dir)
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

        # Processes draw different dropout masks; DDP gives them the weights of the first one.
        torch.manual_seed(config.seed + fabric.global_rank)
        self.network = build_network(
            config,
            num_classes=len(self.train_images.classes),
            in_channels=self.train_images.pixels.shape[1],
        )
        if launch.compile:
            self.network.compile(dynamic=False)  # batches have two sizes, the last being smaller
        self.model, self.optimizer = fabric.setup(
            self.network,
            torch.optim.SGD(
                self.network.parameters(),
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            ),
        )
        self.max_steps = math.inf if launch.max_steps is None else launch.max_steps
        # A look at the loss waits for the device: free on a CPU, and rare elsewhere.
        self.look_every = 1 if fabric.device.type == "cpu" else 32

    def run(self) -> None:
        """Train epoch by epoch, until the end or ``max_steps``."""
        self.progress = state.restore(self.folder, self.fabric, self.network, self.optimizer)
        if (self.progress.history or self.progress.step) and self.launch.verbose:
            self.fabric.print(
                f"going on with {self.folder.path} after epoch {len(self.progress.history)}, "
                f"step {self.progress.step}"
            )
        self._write_config()
        with self._bar() as self.bar:
            while not self.config.finished(self.progress.history):
                if not self._train_epoch():
                    self._pause()
                    return
                self._end_epoch()

    def _train_epoch(self) -> bool:
        """Take the steps of one epoch; tell whether it was to its end."""
        progress, config = self.progress, self.config
        epoch = len(progress.history)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(epoch)
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
        return progress.step == self.steps

    def _forward(self, x: Tensor) -> Tensor:
        try:
            return self.model(x.to(memory_format=torch.channels_last))  # type: ignore[no-any-return]
        except ValueError as error:
            config = self.config
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
                raise self._diverged(loss, first + i + 1)
            sums.loss += loss
            sums.correct += correct
            sums.images += images * world_size
            self.bar.update(images * world_size)
        pending.clear()
        now = time.perf_counter()
        sums.seconds += now - self.clock
        self.clock = now
        self.bar.set_postfix(
            loss=f"{sums.loss / sums.images:.3f}",
            accuracy=f"{sums.correct / sums.images:.1%}",
            refresh=False,
        )

    def _diverged(self, loss: float, step: int) -> DivergedError:
        config = self.config
        precision = "" if config.precision == "32-true" else " or --precision 32-true"
        return DivergedError(
            f"the loss is {loss} at epoch {len(self.progress.history) + 1}, step {step} of "
            f"{self.steps}: training has diverged. Try an --lr below {config.lr:g}{precision}. "
            "Nothing has been saved since"
        )

    def _end_epoch(self) -> None:
        """Test the network, write down the epoch, and save."""
        history, sums = self.progress.history, self.progress.sums
        if self.fabric.world_size > 1:  # the running statistics of the process that saves
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)
        test_loss, test_accuracy = measure(
            self.network, self.test_images, self.preprocess, self.fabric
        )
        metrics = {
            "epoch": len(history) + 1,
            "train_loss": sums.loss / sums.images,
            "train_accuracy": sums.correct / sums.images,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": self.config.lr_at(len(history)),
            "seconds": sums.seconds,
            "images_per_second": sums.images / sums.seconds,
        }
        is_best = all(test_accuracy > earlier["test_accuracy"] for earlier in history)
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
                f"{sums.images / sums.seconds:,.0f} images/s. Without --max-steps it goes on."
            )

    def _save_if_due(self) -> None:
        due = time.perf_counter() - self.saved >= 60 * self.launch.checkpoint_minutes
        if self.fabric.broadcast(due):
            self._save()
            self.clock = self.saved = time.perf_counter()

    def _save(self) -> None:
        state.save(self.folder, self.fabric, self.network, self.optimizer, self.progress)

    def _write_config(self) -> None:
        if not self.fabric.is_global_zero or (self.folder.path / "config.yaml").exists():
            return
        device = self.fabric.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        standardise = None
        if self.preprocess.mean is not None and self.preprocess.std is not None:
            standardise = {"mean": [*self.preprocess.mean], "std": [*self.preprocess.std]}
        self.folder.write_config(
            {
                "run": self.config.record(),
                "classes": list(self.train_images.classes),
                "image_shape": list(self.train_images.pixels.shape[1:]),
                "standardise": standardise,
                "environment": {
                    "kernelnorm": kernelnorm.__version__,
                    "torch": str(torch.__version__),
                    "device": f"{device.type}: {name}",
                    "processes": self.fabric.world_size,
                },
            }
        )

    def _bar(self) -> tqdm[Any]:
        """Return the bar of the whole run, so that its time left is the run's."""
        images, progress = len(self.train_images), self.progress
        return tqdm(
            total=self.config.epochs * images,
            initial=len(progress.history) * images + progress.sums.images,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            leave=False,
            disable=None if self.fabric.is_global_zero else True,  # None: off where no one looks
        )
