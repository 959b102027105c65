"""Tests the network of a run (loss, accuracy), and predicts the classes of image files."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

from kernelnorm import set_evaluation
from kernelnorm.arguments import Evaluation
from kernelnorm.experiments.checks import check_data
from kernelnorm.experiments.data import Images, Preprocess, batches
from kernelnorm.experiments.errors import DataError, RunError
from kernelnorm.experiments.inputs import describe_images, load_split
from kernelnorm.experiments.launch import make_fabric, over_processes
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.trained import Checkpoint, Trained, load

__all__ = ["Score", "evaluate", "measure", "predict", "seeded"]

EVALUATIONS: tuple[Evaluation, ...] = get_args(Evaluation)
TEST_BATCH_SIZE = 128


@dataclass(frozen=True)
class Score:
    """The test loss and accuracy under one evaluation behaviour, as means over its passes.

    ``accuracy_spread`` is the sample standard deviation over the passes; 0 for a single pass.
    """

    evaluation: str
    loss: float
    accuracy: float
    passes: int = 1
    accuracy_spread: float = 0.0

    @classmethod
    def over_passes(cls, evaluation: str, results: Sequence[tuple[float, float]]) -> Score:
        """Return the score of passes, each given as its loss and accuracy."""
        losses, accuracies = zip(*results, strict=True)
        spread = statistics.stdev(accuracies) if len(results) > 1 else 0.0
        loss, accuracy = statistics.fmean(losses), statistics.fmean(accuracies)
        return cls(evaluation, loss, accuracy, len(results), spread)


def measure(
    network: nn.Module, images: Images, preprocess: Preprocess, fabric: Fabric
) -> tuple[float, float]:
    """Return the mean loss and the accuracy; the processes share the images."""
    sums = torch.zeros(2, device=fabric.device)
    was_training = network.training
    network.eval()
    with torch.no_grad(), fabric.autocast():
        for x, y in batches(
            images,
            TEST_BATCH_SIZE,
            train=False,
            preprocess=preprocess,
            device=fabric.device,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        ):
            logits = network(x.to(memory_format=torch.channels_last)).float()
            loss = F.cross_entropy(logits, y, reduction="sum")
            sums += torch.stack([loss, (logits.argmax(1) == y).sum()])
    network.train(was_training)
    loss, correct = over_processes(fabric, sums).tolist()
    return loss / len(images), correct / len(images)


def evaluate(
    run: str | Path,
    *,
    data_dir: str | Path = "data",
    dataset: str | Path | None = None,
    evaluations: Sequence[Evaluation] = EVALUATIONS,
    checkpoint: Checkpoint = "last",
    accelerator: str = "auto",
    passes: int = 5,
) -> list[Score]:
    """Score a run's network on its test images, with the precision that it was trained with.

    Args:
        run: the run's folder.
        data_dir: the folder of the data.
        dataset: the folder of the images, if it has moved since training.
        evaluations: how kernel layers compute in evaluation, see
            :func:`kernelnorm.set_evaluation`; a network without such layers has one score, ``"-"``.
        checkpoint: ``"last"``, or ``"best"``, which was chosen on the same test images.
        accelerator: one of Lightning Fabric's: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        passes: how many seeded passes ``"monte_carlo"`` averages.

    Raises:
        RunError: the folder holds no such checkpoint, or a damaged one, the images have changed, or
            ``passes`` is not positive.
        DataError: the test images are missing or damaged.
    """
    if passes < 1:
        raise RunError(f"passes must be positive, got {passes}")
    trained, fabric = _trained(run, checkpoint, accelerator)
    config, network = trained.config, trained.network.to(fabric.device)
    if dataset is not None:
        config = replace(config, dataset=str(dataset))
    try:
        images = load_split(config, "test", data_dir)
    except DataError as error:
        moved = dataset is None and "is not a folder" in str(error)
        raise DataError(f"{error}. If it has moved, give --dataset" if moved else error) from error
    check_data(RunFolder(Path(run).expanduser()), describe_images(test=images))
    scores = []
    if config.norm != "kernel":
        return [Score("-", *measure(network, images, trained.to_input, fabric))]
    for evaluation in evaluations:
        set_evaluation(network, evaluation)
        results = []
        for seed in range(passes if evaluation == "monte_carlo" else 1):
            with seeded(seed, fabric.device):
                results.append(measure(network, images, trained.to_input, fabric))
        scores.append(Score.over_passes(evaluation, results))
    return scores


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random numbers of a block; they continue after it as if it had not been."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def predict(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    checkpoint: Checkpoint = "best",
    accelerator: str = "auto",
    top: int = 3,
) -> list[list[tuple[str, float]]]:
    """Return for each image the likeliest classes and their probabilities, the likeliest first.

    Args:
        run: the run's folder.
        images: image files. They are resized as the training images were; if the training images
            were not square, the files must have their size.
        checkpoint: ``"best"`` or ``"last"``.
        accelerator: one of Lightning Fabric's: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        top: the number of classes per image.

    Raises:
        RunError: the folder holds no such checkpoint, or a damaged one, or an image has the wrong
            size.
        DataError: an image cannot be read.
    """
    trained, fabric = _trained(run, checkpoint, accelerator)
    network = trained.network.to(fabric.device)
    predictions = []
    for image in images:
        x = trained.preprocess(image).to(fabric.device)
        with fabric.autocast():
            logits = network(x)[0]
        probabilities = logits.float().softmax(0)
        best = probabilities.topk(min(top, len(trained.classes)))
        predictions.append(
            [
                (trained.classes[i], p)
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        )
    return predictions


def _trained(run: str | Path, checkpoint: Checkpoint, accelerator: str) -> tuple[Trained, Fabric]:
    trained = load(run, checkpoint)
    return trained, make_fabric(accelerator, precision=trained.config.precision)
