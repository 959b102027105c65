"""Loads, describes, checks and preprocesses the images of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from kernelnorm.experiments.checks import check_data
from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.data import Images, Preprocess, load_images
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.recipes import NAMED_DATASETS
from kernelnorm.experiments.runs import RunFolder

__all__ = ["ImageCheck", "check_splits", "describe_images", "load_split", "make_preprocess"]


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


class ImageCheck:
    """Checks that runs that have ended were trained on the images that a configuration names.

    The name of a run's folder does not contain the path of a folder of images, so another folder of
    the same name may hold a run on other images. Named data sets are not checked. The images of a
    data set are loaded once.

    Args:
        data_dir: the folder of the data.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._found: dict[tuple[object, ...], dict[str, Any]] = {}

    def __call__(self, folder: RunFolder, config: RunConfig) -> None:
        """Check a run.

        Raises:
            DataError: images are missing or damaged.
            RunError: the run is of other images.
        """
        if config.dataset in NAMED_DATASETS:
            return
        key = config.dataset, config.image_size, config.subset
        if key not in self._found:
            train = load_split(config, "train", self._data_dir)
            test = load_split(config, "test", self._data_dir)
            self._found[key] = describe_images(train=train, test=test)
        check_data(folder, self._found[key])


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
