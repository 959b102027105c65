"""What a trained network is worth, and what it sees in an image."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

from kernelnorm import set_evaluation
from kernelnorm.arguments import Evaluation
from kernelnorm.experiments.data import Images, Preprocess, batches, load_images, read_image
from kernelnorm.experiments.launch import make_fabric, over_processes
from kernelnorm.experiments.recipes import RunConfig
from kernelnorm.experiments.runs import RunError, RunFolder
from kernelnorm.models import create_model

__all__ = ["Score", "build_network", "describe", "evaluate", "load_split", "measure", "predict"]

EVALUATIONS: tuple[Evaluation, ...] = get_args(Evaluation)
TEST_BATCH_SIZE = 128


@dataclass(frozen=True)
class Score:
    """The test loss and accuracy under one evaluation behaviour; spreads are over its passes."""

    evaluation: str
    loss: float
    accuracy: float
    passes: int = 1
    accuracy_spread: float = 0.0


def build_network(config: RunConfig, *, num_classes: int, in_channels: int) -> nn.Module:
    """Make the untrained network of a run, in the memory layout that convolutions like.

    Raises:
        RunError: the model does not take the configuration's options.
    """
    try:
        network = create_model(
            config.model,
            norm=config.norm,
            num_classes=num_classes,
            in_channels=in_channels,
            **config.model_options,
        )
    except (TypeError, ValueError) as error:
        raise RunError(f"{config.model} cannot be made: {error}. See --model-options") from error
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load_split(config: RunConfig, split: Literal["train", "test"], data_dir: str | Path) -> Images:
    """Load the training or the test images of a run."""
    images = load_images(config.dataset, split, data_dir=data_dir, image_size=config.image_size)
    return images if config.subset is None else images.subset(min(config.subset, len(images)))


def describe(**splits: Images) -> dict[str, Any]:
    """Return the classes, the shape and the numbers of images, as ``config.yaml`` has them."""
    first = next(iter(splits.values()))
    return {
        "classes": list(first.classes),
        "image_shape": list(first.pixels.shape[1:]),
        **{f"{split}_images": len(images) for split, images in splits.items()},
    }


def measure(
    network: nn.Module, images: Images, preprocess: Preprocess, fabric: Fabric
) -> tuple[float, float]:
    """Return the mean loss and the accuracy, the images shared out over the processes."""
    sums = torch.zeros(2, device=fabric.device)
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
    network.train()
    loss, correct = over_processes(fabric, sums).tolist()
    return loss / len(images), correct / len(images)


def evaluate(
    run: str | Path,
    *,
    data_dir: str | Path = "data",
    dataset: str | Path | None = None,
    evaluations: Sequence[Evaluation] = EVALUATIONS,
    checkpoint: str = "last",
    accelerator: str = "auto",
    passes: int = 5,
) -> list[Score]:
    """Score a run's network on its test images, with the precision that it was trained with.

    Args:
        run: the run's folder.
        data_dir: where the data is.
        dataset: the folder of the images, if it is not where it was in training.
        evaluations: behaviours of the kernel layers in evaluation, see
            :func:`kernelnorm.set_evaluation`; a network without such layers has one score, ``"-"``.
        checkpoint: ``"last"``, or ``"best"``, which was chosen on the same test images.
        accelerator: as Lightning Fabric names them.
        passes: how many seeded passes ``"monte_carlo"`` averages.

    Raises:
        RunError: the folder holds no such checkpoint, or a damaged one, or the images have changed.
        DataError: the test images are missing or damaged.
    """
    config, content, network, fabric = _trained(run, checkpoint, accelerator)
    if dataset is not None:
        config = replace(config, dataset=str(dataset))
    images = load_split(config, "test", data_dir)
    RunFolder(run).check_data(describe(test=images))
    preprocess = _preprocess(content)
    scores = []
    if config.norm != "kernel":
        return [Score("-", *measure(network, images, preprocess, fabric))]
    for evaluation in evaluations:
        set_evaluation(network, evaluation)
        results = []
        for seed in range(passes if evaluation == "monte_carlo" else 1):
            torch.manual_seed(seed)
            results.append(measure(network, images, preprocess, fabric))
        losses, accuracies = zip(*results, strict=True)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        loss, accuracy = statistics.fmean(losses), statistics.fmean(accuracies)
        scores.append(Score(evaluation, loss, accuracy, len(results), spread))
    return scores


@torch.no_grad()
def predict(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    checkpoint: str = "best",
    accelerator: str = "auto",
    top: int = 3,
) -> list[list[tuple[str, float]]]:
    """Return for each image the likeliest classes and their probabilities, the likeliest first.

    Args:
        run: the run's folder.
        images: image files; they are resized as the training images were. If those were not
            square, they must have the same size.
        checkpoint: ``"best"`` or ``"last"``.
        accelerator: as Lightning Fabric names them.
        top: how many classes.

    Raises:
        RunError: the folder holds no such checkpoint, or a damaged one, or an image has another
            size than it must have.
        DataError: an image cannot be read.
    """
    _, content, network, fabric = _trained(run, checkpoint, accelerator)
    channels, height, width = content["image_shape"]
    classes, preprocess = content["classes"], _preprocess(content)
    network.eval()
    predictions = []
    for image in images:
        pixels = read_image(image, height if height == width else None, channels)
        if pixels.shape[1:] != (height, width):
            raise RunError(
                f"the image {image} is {pixels.shape[2]} pixels wide and {pixels.shape[1]} high; "
                f"the images of {run} are {width} by {height}: bring it to that size"
            )
        with fabric.autocast():
            logits = network(preprocess(pixels[None].to(fabric.device)))[0]
        probabilities = logits.float().softmax(0)
        best = probabilities.topk(min(top, len(classes)))
        predictions.append(
            [
                (classes[i], p)
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        )
    return predictions


class _Trained(NamedTuple):
    config: RunConfig
    content: dict[str, Any]  # of config.yaml
    network: nn.Module
    fabric: Fabric


def _trained(run: str | Path, checkpoint: str, accelerator: str) -> _Trained:
    folder = RunFolder(run)
    content = folder.read_config()
    config = RunConfig.from_record(content["run"])
    state = folder.load(f"{checkpoint}.ckpt")
    if state is None:
        raise RunError(f"{folder.path} has no {checkpoint}.ckpt yet: train it further")
    network = build_network(
        config, num_classes=len(content["classes"]), in_channels=content["image_shape"][0]
    )
    network.load_state_dict(state["model"])
    fabric = make_fabric(accelerator, precision=config.precision)
    return _Trained(config, content, network.to(fabric.device), fabric)


def _preprocess(content: dict[str, Any]) -> Preprocess:
    statistics_ = content["standardise"]
    if statistics_ is None:
        return Preprocess()
    return Preprocess(mean=tuple(statistics_["mean"]), std=tuple(statistics_["std"]))
