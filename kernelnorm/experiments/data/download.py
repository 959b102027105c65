"""The named data sets: where they come from, fetched, checked by md5 and unpacked."""

from __future__ import annotations

import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests
from tqdm import tqdm

from kernelnorm.experiments.data.disk import replacing, space_for, writable_home
from kernelnorm.experiments.data.images import DataError


@dataclass(frozen=True)
class Dataset:
    """A data set that is published as one archive.

    Args:
        url: where the archive is; its last part is the archive's file name.
        md5: of the archive, which is not opened unless it matches.
        folder: the one folder that the archive holds.
        megabytes: the archive's size, roughly; to see beforehand whether the disk has room.
        image_size: height and width of the images that the experiments use.
    """

    url: str
    md5: str
    folder: str
    megabytes: int
    image_size: int

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
    ),
    "imagenette": Dataset(
        url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
        md5="e793b78cc4c9e9a4ccc0c1155377a412",
        folder="imagenette2-160",
        megabytes=100,
        image_size=160,
    ),
    "imagewoof": Dataset(
        url="https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-320.tgz",
        md5="0f46d997ec2264e97609196c95897a44",
        folder="imagewoof2-320",
        megabytes=330,
        image_size=192,
    ),
}


def locate(name: str, data_dir: Path, *, download: bool, url: str | None = None) -> Path:
    """The folder that holds the data set ``name``, fetched and unpacked if need be.

    Taken in this order: the unpacked archive, a folder of images ``data_dir/name``, ``data_dir``
    itself if it has a folder ``train``, the archive, a download. A ``data_dir`` that cannot be
    written to is only read: downloads and unpacked archives then go to the user's cache folder.
    """
    dataset = DATASETS[name]
    home = writable_home(data_dir)
    for unpacked in (data_dir / dataset.folder, home / dataset.folder):
        if unpacked.is_dir():
            return unpacked
    for folder in (data_dir / name, data_dir):
        if (folder / "train").is_dir():
            return folder
    for archive in (data_dir / dataset.archive, home / dataset.archive):
        if archive.is_file():
            _verify(archive, dataset.md5)
            return _unpack(archive, home / dataset.folder)
    variable = f"KERNELNORM_{name.upper()}_URL"
    url = url or os.environ.get(variable) or dataset.url
    if not download:
        raise DataError(
            f"{name} is not in {data_dir}: expected the archive {dataset.archive}, its folder "
            f"{dataset.folder}, or images in train/<class>/ and val/<class>/ or test/<class>/. "
            f"Allow the download, or fetch {url} and put it there"
        )
    try:
        archive = _download(url, home / dataset.archive, dataset)
    except requests.RequestException as error:
        raise DataError(
            f"cannot download {name} from {url}: {error}. Try again (what has arrived is kept), "
            f"name a mirror in {variable}, or put the file at {home / dataset.archive} by hand"
        ) from error
    except ValueError as error:
        raise DataError(
            f"what came from {url} is not {name}: the md5 of {dataset.archive} should be "
            f"{dataset.md5}. Try again, or name another mirror in {variable}"
        ) from error
    return _unpack(archive, home / dataset.folder)


def _verify(archive: Path, md5: str) -> None:
    found = pooch.file_hash(str(archive), alg="md5")
    if found != md5:
        raise DataError(
            f"{archive} is broken or another version: its md5 is {found}, expected {md5}. "
            "Delete it, so that it is downloaded again, or replace it"
        )


def _download(url: str, target: Path, dataset: Dataset) -> Path:
    """Fetch ``url``, in three attempts; ``target`` appears once the md5 is right."""

    def resume(url: str, output_file: str, _: pooch.Pooch) -> None:
        part = target.with_name(target.name + ".part")
        part.touch()
        start = part.stat().st_size
        headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        with requests.get(url, headers=headers, stream=True, timeout=30) as response:
            # 416: nothing lies beyond what we have, so it is whole, and the md5 will tell.
            if response.status_code != requests.codes.requested_range_not_satisfiable:
                response.raise_for_status()
                start = start if response.status_code == requests.codes.partial_content else 0
                length = response.headers.get("Content-Length")
                with (
                    part.open("ab" if start else "wb") as file,
                    tqdm(
                        desc=target.name,
                        initial=start,
                        total=start + int(length) if length else None,
                        unit="B",
                        unit_scale=True,
                        disable=None,
                    ) as bar,
                ):
                    for chunk in response.iter_content(1 << 16):
                        bar.update(file.write(chunk))
        part.replace(output_file)

    downloads = pooch.create(
        path=target.parent,
        base_url="",
        registry={target.name: f"md5:{dataset.md5}"},
        urls={target.name: url},
        retry_if_failed=2,
    )
    with space_for(dataset.megabytes * 1_000_000, target.parent):
        return Path(downloads.fetch(target.name, downloader=resume))


def _unpack(archive: Path, target: Path) -> Path:
    """Unpack ``archive``, whose members must all be plain files or folders in ``target.name``/."""
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        with replacing(target, needed=sum(member.size for member in members)) as folder:
            folder.mkdir()
            for member in tqdm(members, desc=f"unpacking {archive.name}", disable=None):
                path = (folder.parent / member.name).resolve()
                plain = member.isfile() or member.isdir()
                if not plain or not path.is_relative_to(folder.resolve()):
                    raise DataError(
                        f"{archive} holds {member.name!r}, which is not a plain file or folder in "
                        f"{target.name}/. Do not use this archive"
                    )
                if file := tar.extractfile(member):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with file, path.open("wb") as copy:
                        shutil.copyfileobj(file, copy)
    return target
