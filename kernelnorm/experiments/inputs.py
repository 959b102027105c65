"""Loads, describes, checks and preprocesses the images of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.data import Images, Preprocess, load_images
from kernelnorm.experiments.errors import RunError

__all__ = ["check_splits", "describe_images", "load_split", "make_preprocess"]


def load_split(config: RunConfig, split: Literal["train", "test"], data_dir: str | Path) -> Images:
    """Load the training or the test images of a run."""
    return load_images(
        config.dataset,
        split,
        data_dir=data_dir,
        image_size=config.image_size,
        subset=config.subset,
    )


def describe_images(**splits: Images) -> dict[str, Any]:
    """Return what ``config.yaml`` says about the images: classes, shape, numbers, fingerprints."""
    first = next(iter(splits.values()))
    own_split = {"split": first.split} if first.split else {}
    return {
        "classes": list(first.classes),
        "image_shape": list(first.pixels.shape[1:]),
        **own_split,
        **{f"{split}_images": len(images) for split, images in splits.items()},
        **{f"{split}_fingerprint": images.fingerprint() for split, images in splits.items()},
    }


def make_preprocess(config: RunConfig, images: Images) -> Preprocess:
    """Return the preprocessing.

    A private run standardises with mean 0.5 and deviation 0.25: the statistics of its images are
    not private.
    """
    if not config.standardise or config.norm == "kernel":
        return Preprocess()
    if config.private is not None:
        return Preprocess.fixed(images)
    return Preprocess.standardise(images)


def check_splits(train: Images, test: Images) -> None:
    """Refuse too few classes and test images of another size, before anything is trained.

    Raises:
        RunError: there is one class, a class has no training image, or test images differ in size.
    """
    if len(train.classes) < 2:
        raise RunError(
            f"the images have only one class, {train.classes[0]!r}: a network needs two to tell "
            "apart. Put the images of each class into a folder of its own"
        )
    present = {*train.labels.tolist()}
    absent = [name for label, name in enumerate(train.classes) if label not in present]
    if absent:
        raise RunError(
            f"none of the {len(train)} training images is of class {absent[0]!r}: there are "
            f"{len(train.classes)} classes, so give --subset at least that number"
        )
    sizes = [f"{images.pixels.shape[3]}x{images.pixels.shape[2]}" for images in (train, test)]
    if sizes[0] != sizes[1]:
        raise RunError(
            f"the training images are {sizes[0]} pixels in size, the test images {sizes[1]}: bring "
            "them to one size with --image-size"
        )
