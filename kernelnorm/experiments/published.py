"""The accuracy on ImageNet of weights that the paper's authors have published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kernelnorm import set_evaluation
from kernelnorm.arguments import Evaluation
from kernelnorm.experiments.data import Preprocess, read_image
from kernelnorm.experiments.data.folder import Files, all_images
from kernelnorm.experiments.data.images import balanced
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.evaluation import EVALUATIONS, Score, seeded
from kernelnorm.experiments.launch import make_fabric
from kernelnorm.models import load_published
from kernelnorm.models.knresnet import KNResNet

__all__ = ["IMAGENET", "evaluate_published"]

IMAGENET = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""Standardises with the mean and the deviation of ImageNet's training images, per channel."""
SHORTER_SIDE = 256  # pixels
CROP = 224  # pixels


def evaluate_published(
    network: str,
    file: str | Path,
    images: str | Path,
    *,
    evaluations: Sequence[Evaluation] = EVALUATIONS,
    standardise: bool = True,
    subset: int | None = None,
    batch_size: int = 64,
    accelerator: str = "auto",
    passes: int = 5,
) -> list[Score]:
    """Score published weights on a folder of images.

    Each image is decoded once and resized to 256 pixels along the shorter side. All passes of all
    evaluations use its central 224x224 pixels.

    Args:
        network, file: as for :func:`kernelnorm.models.load_published`.
        images: a folder with ``<class>/*``; the classes are numbered in the order of their names.
        evaluations: how kernel layers compute in evaluation, see :func:`kernelnorm.set_evaluation`.
        standardise: with :data:`IMAGENET`; otherwise only divide by 255.
        subset: the number of images, the classes balanced; default: all.
        batch_size: images per batch; the scores of ``"monte_carlo"`` depend on it.
        accelerator: one of Lightning Fabric's: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        passes: how many seeded passes ``"monte_carlo"`` averages.

    Raises:
        RunError: the weights cannot be read, or are for another network, for images of another
            kind than ImageNet's, or for another number of classes than the folder has; or a number
            is not positive.
        DataError: the images are missing or damaged.
    """
    for name, value in (("subset", subset), ("batch_size", batch_size), ("passes", passes)):
        if value is not None and value < 1:
            raise RunError(f"{name} must be positive, got {value}")
    found = all_images(Path(images))
    if subset is not None:
        chosen = balanced(found.labels, min(subset, len(found.files)))
        files = [found.files[i] for i in chosen.tolist()]
        found = found._replace(files=files, labels=found.labels[chosen])
    model = _load(network, Path(file), found)
    fabric = make_fabric(accelerator)
    model = model.to(fabric.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    preprocess = IMAGENET if standardise else Preprocess()
    seeds = {name: range(passes if name == "monte_carlo" else 1) for name in evaluations}
    sums = {name: torch.zeros(len(seeds[name]), 2, device=fabric.device) for name in evaluations}
    with torch.no_grad(), tqdm(total=len(found.files), unit=" images", disable=None) as bar:
        for number, (pixels, labels) in enumerate(_batches(found, batch_size)):
            x = preprocess(pixels.to(fabric.device)).to(memory_format=torch.channels_last)
            y = labels.to(fabric.device)
            for name in evaluations:
                set_evaluation(model, name)
                for seed in seeds[name]:
                    with seeded(number * passes + seed, fabric.device):
                        scores = model(x)
                    loss = F.cross_entropy(scores, y, reduction="sum")
                    sums[name][seed] += torch.stack([loss, (scores.argmax(1) == y).sum()])
            bar.update(len(y))
    means = {name: (total / len(found.files)).tolist() for name, total in sums.items()}
    return [Score.over_passes(name, [tuple(m) for m in means[name]]) for name in evaluations]


def _load(name: str, file: Path, images: Files) -> KNResNet:
    try:
        network = load_published(name, file)
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error
    filters = tuple(network.stem.weight.shape[1:])
    if filters != (3, 7, 7):
        raise RunError(
            f"{file} is not of a network for ImageNet: its first filters are of shape {filters}, "
            "not (3, 7, 7)"
        )
    if network.fc.out_features != len(images.classes):
        raise RunError(
            f"{images.folder} has {len(images.classes)} folders of classes, but the network of "
            f"{file} tells {network.fc.out_features} classes apart: give a folder with all of them"
        )
    return network


def _batches(images: Files, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over batches of pixels and labels; the next batch is decoded meanwhile."""
    parts = [images.files[i : i + batch_size] for i in range(0, len(images.files), batch_size)]
    with ThreadPoolExecutor() as pool:
        ahead = pool.map(_read, parts[0])
        for part, labels in zip([*parts[1:], []], images.labels.split(batch_size), strict=True):
            decoded, ahead = ahead, pool.map(_read, part)
            yield torch.stack([*decoded]), labels


def _read(file: Path) -> Tensor:
    start = (SHORTER_SIDE - CROP) // 2
    square = read_image(file, SHORTER_SIDE)  # cut at the ends of the longer side
    return square[:, start : start + CROP, start : start + CROP]
