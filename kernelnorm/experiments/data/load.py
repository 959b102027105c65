"""Loads the images of a named dataset or of a folder."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from kernelnorm.experiments.data.decode import decode, to_pixels
from kernelnorm.experiments.data.download import DATASETS, locate
from kernelnorm.experiments.data.folder import Split, find_images
from kernelnorm.experiments.data.images import Images, balanced
from kernelnorm.experiments.errors import DataError

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR10_RECORDS = 10_000  # in each file


def load_images(
    dataset: str | Path,
    split: Split,
    *,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    subset: int | None = None,
    download: bool = True,
    url: str | None = None,
) -> Images:
    """Load one split of a dataset.

    Args:
        dataset: one of

            - ``"digits"``: scikit-learn's 1,797 handwritten digits, 1 x 8 x 8, nothing to download;
              every fifth image of each digit is a test image;
            - ``"cifar10"``: 3 x 32 x 32, 50,000 and 10,000 images;
            - ``"imagenette"``: 3 x 160 x 160, 9,469 and 3,925 images;
            - ``"imagewoof"``: 3 x 192 x 192, 9,025 and 3,929 images. Other numbers of images are
              accepted with a warning on the standard error stream;
            - a folder with ``train/<class>/*`` and ``val/<class>/*`` or ``test/<class>/*``. The
              classes are those of ``train``, sorted by name. Images may be in subfolders;
            - a folder with ``<class>/*``: a fifth of each class, chosen with a fixed seed, are
              the test images.
        split: ``"train"`` or ``"test"``. The test images of a folder are those in ``val``; those in
            ``test`` count only where there is no ``val``, and stay unseen otherwise.
        data_dir: the folder of the named datasets. It holds the published archive, the unpacked
            archive, or a folder of images with the dataset's name; if ``train`` in it has 10
            classes, it is itself the folder of images. Downloads and caches go there too, or to
            ``$XDG_CACHE_HOME/kernelnorm`` (``~/.cache/kernelnorm``) if it is read-only.
        image_size: height and width; :func:`read_image` says how images are resized. Default: the
            dataset's own, as listed; the images of a folder must then all have one size.
        subset: at most that many images, the first of each class; others are not decoded.
        download: whether a named dataset that is not in ``data_dir`` may be downloaded.
        url: where to download it from; default: the environment variable
            ``KERNELNORM_<DATASET>_URL``, else the publisher. The md5 is checked in any case.

    Raises:
        DataError: if the data is missing or damaged, or the disk is full.

    Examples::

        >>> train = load_images("digits", "train")
        >>> len(train), train.pixels.shape, train.pixels.dtype
        (1442, torch.Size([1442, 1, 8, 8]), torch.uint8)
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if subset is not None and subset < 1:
        raise ValueError(f"subset must be at least 1, got {subset}")
    data_dir = Path(data_dir).expanduser()
    if dataset == "digits":
        return _resized(_first(_digits(split), subset), image_size)
    if dataset not in DATASETS:
        return _folder(Path(dataset).expanduser(), split, image_size, subset, data_dir)
    folder = locate(str(dataset), data_dir, download=download, url=url)
    if folder.name == DATASETS["cifar10"].folder:
        return _resized(_first(_cifar10(folder, split), subset), image_size)
    image_size = image_size or DATASETS[str(dataset)].image_size
    return _folder(folder, split, image_size, subset, data_dir, name=str(dataset))


def _first(images: Images, subset: int | None) -> Images:
    return images if subset is None else images.subset(min(subset, len(images)))


def _digits(split: Split) -> Images:
    pixels, labels = _all_digits()
    place_in_class = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    chosen = (place_in_class % 5 == 0) == (split == "test")
    return Images(pixels[chosen], labels[chosen], tuple(str(digit) for digit in range(10)))


@functools.cache
def _all_digits() -> tuple[Tensor, Tensor]:
    """Pixels and labels; cached, since scikit-learn reads a text file each time."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    return pixels, torch.from_numpy(digits.target).long()


def _cifar10(folder: Path, split: Split) -> Images:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    records = torch.cat([_cifar10_records(folder / name) for name in names])
    pixels = records[:, 1:].reshape(-1, 3, 32, 32)
    return Images(pixels, records[:, 0].long(), CIFAR10_CLASSES)


def _cifar10_records(file: Path) -> Tensor:
    """The file's records, one per row: a label, then 3 x 32 x 32 pixels."""
    expected = CIFAR10_RECORDS * 3073
    size = file.stat().st_size if file.is_file() else 0
    if size != expected:
        raise DataError(
            f"{file} is missing or truncated: it has {size:,} bytes, expected {expected:,}. Delete "
            f"the folder {file.parent}, so that it is unpacked or downloaded again"
        )
    return torch.from_numpy(np.fromfile(file, np.uint8)).reshape(-1, 3073)


def _resized(images: Images, image_size: int | None) -> Images:
    """Resize like :func:`read_image`, for datasets that are not image files."""
    if image_size in (None, images.pixels.shape[-1]):
        return images
    pixels = images.pixels.new_empty(*images.pixels.shape[:2], image_size, image_size)
    bar = tqdm(images.pixels, desc="resizing images", unit=" images", delay=1, disable=None)
    for row, image in zip(pixels, bar, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
        row.copy_(to_pixels(picture, image_size))
    return replace(images, pixels=pixels)


def _folder(
    root: Path,
    split: Split,
    image_size: int | None,
    subset: int | None,
    data_dir: Path,
    name: str | None = None,
) -> Images:
    """The images below ``root``; warns if they do not match the dataset ``name``, if given."""
    folder, files, labels, classes, own_split = find_images(root, split)
    if name is not None:
        _compare_with_published(name, split, folder, len(files), len(classes))
    part = f"{own_split and split}{subset or ''}"
    if subset is not None and subset < len(files):
        chosen = balanced(labels, subset)
        files, labels = [files[i] for i in chosen], labels[chosen]
    pixels = decode(folder, files, image_size, data_dir, part)
    return Images(pixels, labels, classes, own_split)


def _compare_with_published(
    name: str, split: Split, folder: Path, images: int, classes: int
) -> None:
    dataset = DATASETS[name]
    published = dataset.train_images if split == "train" else dataset.test_images
    if (images, classes) != (published, dataset.classes):
        tqdm.write(
            f"warning: {folder} has {images:,} images of {classes} classes, but {name} was "
            f"published with {published:,} of {dataset.classes}: results will not compare. If "
            "unpacking it was interrupted, unpack it again",
            file=sys.stderr,
        )
