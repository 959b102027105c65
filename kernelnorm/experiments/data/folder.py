"""A folder of images: its classes, its training and test images, and the files left out."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from kernelnorm.experiments.data.decode import suffixes
from kernelnorm.experiments.data.download import DATASETS, subfolders
from kernelnorm.experiments.errors import DataError

Split = Literal["train", "test"]
SPLIT_SEED = 0
OWN_SPLIT = f"one fifth of each class for testing, seed {SPLIT_SEED}"


class Files(NamedTuple):
    """The image files of a split; ``split`` says how a folder without a split was divided."""

    folder: Path
    files: list[Path]
    labels: Tensor
    classes: tuple[str, ...]
    split: str = ""


def find_images(root: Path, split: Split) -> Files:
    """The images of one split below ``root``.

    A folder with ``train/<class>/*`` and ``val/<class>/*`` or ``test/<class>/*`` has a split. In a
    folder with ``<class>/*``, a fifth of each class, chosen at random with a fixed seed, are the
    test images.

    Raises:
        DataError: there are no such folders, a class has too few images, or a class of the test
            images is not in ``train``.
    """
    if (root / "train").is_dir():
        return _divided(root, split)
    divided = [name for name in ("val", "test") if (root / name).is_dir()]
    if divided or not root.is_dir() or not subfolders(root):
        problem = "is not a folder"
        if root.is_dir():
            problem = "lacks the folder train" if divided else "has no folders of classes"
        raise DataError(
            f"{root} {problem}: a data set is digits, {', '.join(DATASETS)}, or a folder with "
            "<class>/, or with train/<class>/ and val/<class>/ or test/<class>/"
        )
    return _own_split(root, split)


def all_images(folder: Path) -> Files:
    """All images in the folders of classes ``<class>/*``, without a split.

    Raises:
        DataError: there are no such folders, or one has no images.
    """
    classes = subfolders(folder) if folder.is_dir() else []
    if not classes:
        problem = "has no folders of classes" if folder.is_dir() else "is not a folder"
        raise DataError(f"{folder} {problem}: expected {folder / '<class>' / '*'}")
    found = _files_of(folder, classes)
    return Files(folder, *_labelled(found, classes), tuple(classes))


def _divided(root: Path, split: Split) -> Files:
    names = ("train",) if split == "train" else ("val", "test")  # the first that exists
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{root} lacks the folder val or test, with the test images")
    classes = subfolders(root / "train")
    strange = sorted(set(subfolders(folder)) - set(classes))
    if strange:
        raise DataError(
            f"{folder} has a class {strange[0]!r} that {root / 'train'} has not: the classes are "
            f"{', '.join(classes)}. Rename or remove it"
        )
    found = _files_of(folder, classes)
    return Files(folder, *_labelled(found, classes), tuple(classes))


def _own_split(root: Path, split: Split) -> Files:
    classes = subfolders(root)
    found = _files_of(root, classes, tell=split == "train")
    for label, files in found.items():
        if len(files) < 2:
            raise DataError(
                f"the class folder {root / label} has 1 image: a class needs at least 2, one of "
                "them for testing. Add images, or remove the folder"
            )
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        order = torch.randperm(len(files), generator=generator).tolist()
        test = set(order[: max(1, len(files) // 5)])
        found[label] = [file for i, file in enumerate(files) if (i in test) == (split == "test")]
    if split == "train":
        _tell_once(f"{root} has no train and val folders: {OWN_SPLIT}")
    return Files(root, *_labelled(found, classes), tuple(classes), OWN_SPLIT)


def _labelled(found: dict[str, list[Path]], classes: list[str]) -> tuple[list[Path], Tensor]:
    files = [file for label in classes for file in found.get(label, [])]
    labels = [i for i, label in enumerate(classes) for _ in found.get(label, [])]
    return files, torch.tensor(labels)


def _files_of(folder: Path, classes: list[str], tell: bool = True) -> dict[str, list[Path]]:
    """The image files in the class folders and their subfolders; reports the other files."""
    found: dict[str, list[Path]] = {}
    left_out: Counter[str] = Counter()
    for label in classes:
        if not (folder / label).is_dir():
            continue  # a class without test images
        images = []
        for file in _walk(folder / label):
            if file.suffix.lower() in suffixes():
                images.append(file)
            else:
                left_out[file.suffix.lower() or "without suffix"] += 1
        if not images:
            raise DataError(
                f"the class folder {folder / label} has no images that can be read "
                "(.jpg, .png, .webp, ...). Fill it or remove it"
            )
        found[label] = sorted(images)
    if not found:
        raise DataError(f"{folder} has no class folders: expected {folder / '<class>' / '*'}")
    if left_out and tell:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in left_out.most_common(5))
        total = left_out.total()
        files = "1 file that is" if total == 1 else f"{total:,} files that are"
        no_image = "not an image" if total == 1 else "not images"
        _tell_once(f"left out {files} {no_image} in {folder}: {kinds}")
    return found


@functools.cache
def _tell_once(notice: str) -> None:
    """Print a notice once per process, as each run of a comparison loads the same images."""
    tqdm.write(notice, file=sys.stderr)


def _walk(folder: Path) -> list[Path]:
    """All files below a folder except hidden ones; linked folders are not followed."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return files
