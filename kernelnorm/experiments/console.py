"""What a run prints: a start line, a progress bar, and a line for each epoch."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.data import Images
from kernelnorm.experiments.private_options import rounded_up
from kernelnorm.experiments.runs import Metrics
from kernelnorm.experiments.state import Progress, Sums
from kernelnorm.experiments.style import LABELS

__all__ = ["Bar", "epoch_line", "pause_line", "start_line"]


class Bar:
    """The progress bar of a whole run, over the steps of all its epochs.

    Args:
        config: the run's configuration.
        per_epoch: the number of steps in an epoch.
        progress: how far the run has come.
        disable: hides the bar; ``None`` shows it on a terminal only.
    """

    def __init__(
        self, config: RunConfig, per_epoch: int, progress: Progress, disable: bool | None
    ) -> None:
        self.config = config
        self.tqdm: tqdm[Any] = tqdm(
            total=config.epochs * per_epoch,
            initial=len(progress.history) * per_epoch + progress.step,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {remaining} left{postfix}",
            dynamic_ncols=True,
            leave=False,
            disable=disable,
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.tqdm.close()

    def begin_epoch(self, epoch: int) -> None:
        """Show the number of an epoch, counted from 0."""
        config = self.config
        self.tqdm.set_description(
            f"{config.norm} b{config.batch_size} epoch {epoch + 1}/{config.epochs}"
        )

    def show(self, steps: int, sums: Sums, metrics: Metrics) -> None:
        """Advance by ``steps``, and show the epoch's loss and accuracy, and epsilon."""
        images = max(1, sums.images)
        self.tqdm.update(steps)
        shown = {"loss": f"{sums.loss / images:.3f}", "accuracy": f"{sums.correct / images:.1%}"}
        shown |= {name: rounded_up(value) for name, value in metrics.items()}
        self.tqdm.set_postfix(shown, refresh=False)


def start_line(config: RunConfig, train: Images, test: Images) -> str:
    """Return the line that describes the network and the images before training."""
    channels, height, width = train.pixels.shape[1:]
    colour = "grey" if channels == 1 else "colour"
    clipping = "" if config.agc is None else f"; adaptive gradient clipping at {config.agc:g}"
    private = "" if config.private is None else f"; private: {config.private}"
    return (
        f"training {config.model} with {LABELS[config.norm]}: "
        f"{len(train):,} {colour} images of {width}x{height} pixels, "
        f"{len(train.classes)} classes, batch size {config.batch_size}, "
        f"at most {config.epochs} epoch{'s' * (config.epochs > 1)}; "
        f"{len(test):,} test images{clipping}{private}"
    )


def epoch_line(config: RunConfig, metrics: Metrics) -> str:
    """Return the line that is printed after an epoch."""
    losses = "train loss {train_loss:.4f}, test loss {test_loss:.4f}"
    accuracies = "train accuracy {train_accuracy:.2%}, test accuracy {test_accuracy:.2%}"
    speed = "{seconds:.1f} s, {images_per_second:,.0f} images/s"
    spent = f"; epsilon {rounded_up(metrics['epsilon'])}" if "epsilon" in metrics else ""
    line = f"epoch {{epoch}}/{config.epochs}: {losses}; {accuracies}; {speed}{spent}"
    return line.format(**metrics)


def pause_line(steps: int, sums: Sums) -> str:
    """Return the line that is printed when a run pauses; between two epochs it has no figures."""
    figures = ""
    if sums.images:
        figures = (
            f": train loss {sums.loss / sums.images:.4f}, accuracy "
            f"{sums.correct / sums.images:.2%}, {sums.images_per_second:,.0f} images/s"
        )
    taken = "1 step" if steps == 1 else f"{steps} steps"
    return f"paused after {taken}{figures}. Run it without --max-steps to resume."
