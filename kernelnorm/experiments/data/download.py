"""Finds the named datasets on the disk, or downloads, checks (md5) and unpacks them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm

from kernelnorm.experiments.data.disk import locked, space_for, writable_home
from kernelnorm.experiments.errors import DataError
from kernelnorm.experiments.files import replacing


@dataclass(frozen=True)
class Dataset:
    """A dataset that is published as one archive.

    Args:
        url: the archive's address; its last part is the archive's file name.
        md5: of the archive, which is not opened unless it matches.
        folder: the only folder in the archive.
        megabytes: the archive's approximate size, for a check of the disk space.
        image_size: height and width of the images that the experiments use.
        train_images: the number of training images.
        test_images: the number of test images.
        classes: the number of classes.
    """

    url: str
    md5: str
    folder: str
    megabytes: int
    image_size: int
    train_images: int
    test_images: int
    classes: int = 10

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return self.url.rpartition("/")[2]


DATASETS = {
    "cifar10": Dataset(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        megabytes=170,
        image_size=32,
        train_images=50_000,
        test_images=10_000,
    ),
    "imagenette": Dataset(
        url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
        md5="e793b78cc4c9e9a4ccc0c1155377a412",
        folder="imagenette2-160",
        megabytes=100,
        image_size=160,
        train_images=9_469,
        test_images=3_925,
    ),
    "imagewoof": Dataset(
        url="https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-320.tgz",
        md5="0f46d997ec2264e97609196c95897a44",
        folder="imagewoof2-320",
        megabytes=330,
        image_size=192,
        train_images=9_025,
        test_images=3_929,
    ),
}


def locate(name: str, data_dir: Path, *, download: bool, url: str | None = None) -> Path:
    """The folder that holds the dataset ``name``, downloaded and unpacked if necessary.

    The first of these that exists is used: the unpacked archive, a folder of images
    ``data_dir/name``, ``data_dir`` itself if its folder ``train`` has as many classes as the
    dataset, the archive, a download. If ``data_dir`` is not writable, downloads and unpacked
    archives go to the user's cache folder.

    Raises:
        DataError: the dataset is missing and cannot or may not be downloaded, an archive is
            damaged, or the disk is full.
    """
    dataset = DATASETS[name]
    home = writable_home(data_dir)
    if folder := _find(name, data_dir, home):
        return folder
    archives = (data_dir / dataset.archive, home / dataset.archive)
    variable = f"KERNELNORM_{name.upper()}_URL"
    url = url or os.environ.get(variable) or dataset.url
    if not download and not any(archive.is_file() for archive in archives):
        raise DataError(
            f"{name} is not in {data_dir}: expected the archive {dataset.archive}, its folder "
            f"{dataset.folder}, or images of {dataset.classes} classes in train/<class>/ and "
            f"val/<class>/ or test/<class>/. Allow the download, or fetch {url} and put it there"
        )
    target = home / dataset.folder
    with locked(target):
        if folder := _find(name, data_dir, home):  # the process that held the lock made it
            return folder
        for archive in archives:
            if archive.is_file():
                _verify(archive, dataset.md5)
                return _unpack(archive, target)
        try:
            archive = _download(url, home / dataset.archive, dataset)
        except requests.RequestException as error:
            raise DataError(
                f"cannot download {name} from {url}: {error}. Try again (the part that has "
                f"arrived is kept), name a mirror in {variable}, or put the file at "
                f"{home / dataset.archive} by hand"
            ) from error
        except ValueError as error:
            raise DataError(
                f"the file from {url} is not {name}: {error}. Try again, or name another mirror "
                f"in {variable}"
            ) from error
        return _unpack(archive, target)


def _find(name: str, data_dir: Path, home: Path) -> Path | None:
    dataset = DATASETS[name]
    for unpacked in (data_dir / dataset.folder, home / dataset.folder):
        if unpacked.is_dir():
            return unpacked
    if (data_dir / name / "train").is_dir():
        return data_dir / name
    train = data_dir / "train"
    return data_dir if train.is_dir() and len(subfolders(train)) == dataset.classes else None


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in ``folder`` that are not hidden: the names of its classes."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _verify(archive: Path, md5: str) -> None:
    found = _md5(archive)
    if found != md5:
        raise DataError(
            f"{archive} is broken or another version: its md5 is {found}, expected {md5}. "
            "Delete it, so that it is downloaded again, or replace it"
        )


def _download(url: str, target: Path, dataset: Dataset) -> Path:
    """Download ``url`` to ``target``, which appears once the md5 is right; at most 3 attempts."""
    part = target.with_name(target.name + ".part")
    arrived = part.stat().st_size if part.exists() else 0
    with space_for(max(0, dataset.megabytes * 1_000_000 - arrived), target.parent):
        for attempt in (1, 2, 3):
            try:
                _fetch_rest(url, part, most=(2 * dataset.megabytes + 1) * 1_000_000)
                found = _md5(part)
                if found == dataset.md5:
                    break
                part.unlink()
                raise ValueError(
                    f"the md5 of {target.name} should be {dataset.md5}, but is {found}"
                )
            except (requests.RequestException, ValueError):
                if attempt == 3:
                    raise
                time.sleep(attempt)
        return part.replace(target)


def _fetch_rest(url: str, part: Path, most: int) -> None:
    """Append the missing rest of ``url`` to ``part``; start anew if the server cannot resume.

    Raises:
        ValueError: there are more than ``most`` bytes; ``part`` is removed.
    """
    part.touch()
    start = part.stat().st_size
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # the file has no more bytes; the md5 tells whether it is whole
        response.raise_for_status()
        start = start if response.status_code == requests.codes.partial_content else 0
        length = response.headers.get("Content-Length")
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(
                desc=part.stem,
                initial=start,
                total=start + int(length) if length else None,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            for chunk in response.iter_content(1 << 16):
                bar.update(file.write(chunk))
                if file.tell() > most:
                    break
    if part.stat().st_size > most:
        part.unlink()
        raise ValueError(f"it has more than {most / 1e6:,.0f} MB")


def _unpack(archive: Path, target: Path) -> Path:
    """Unpack ``archive``, whose members must all be plain files or folders in ``target.name``/."""
    place = target.resolve()
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        needed = sum(member.size for member in members)
        with space_for(needed, target.parent), replacing(target) as folder:
            folder.mkdir()
            for member in tqdm(members, desc=f"unpacking {archive.name}", disable=None):
                path = (place.parent / member.name).resolve()
                plain = member.isfile() or member.isdir()
                if not plain or not path.is_relative_to(place):
                    raise DataError(
                        f"{archive} holds {member.name!r}, which is not a plain file or folder in "
                        f"{target.name}/. Do not use this archive"
                    )
                if file := tar.extractfile(member):
                    copied = folder / path.relative_to(place)
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    with file, copied.open("wb") as copy:
                        shutil.copyfileobj(file, copy)
    return target
