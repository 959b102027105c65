"""Decodes image files once, in parallel, into memory or into a memory-mapped file."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from kernelnorm.experiments.data.disk import locked, space_for, writable_home
from kernelnorm.experiments.errors import DataError
from kernelnorm.experiments.files import replacing

IN_MEMORY = 16 << 20  # bytes of pixels, decoded in a second or two; more are kept in a file
FORMAT = 1  # of that file: increase it whenever the same images give other pixels
STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow needs other programs for these
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of the image files that Pillow reads by itself, in lower case."""
    known = Image.registered_extensions().items()
    return frozenset(name for name, kind in known if kind in Image.OPEN and kind not in STUBS)


def read_image(path: str | Path, image_size: int | None = None, channels: int = 3) -> Tensor:
    """One image as ``uint8`` of shape :math:`(C, H, W)`.

    Args:
        path: the file. Grey, palette and CMYK images are converted, transparency is dropped, only
            the first frame of an animation is read, and the EXIF orientation is applied.
        image_size: the shorter side is resized to it (bilinear, antialiased), and the longer one
            is cropped at both ends, which keeps the aspect ratio. The paper only says "resized to
            160x160", which could also mean without this ratio. ``None`` keeps the image's own size.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: if the file is missing, corrupt, or has more than 8 bits per channel; colours of
            16 bits are reduced to 8, as Pillow does it.
    """
    try:
        if Path(path).is_fifo():  # reading it would wait for a process that writes to it
            raise DataError(f"{path} is a pipe: give image files")
        with Image.open(path) as image:
            if image_size is not None:
                image.draft(None, (image_size, image_size))
            picture = upright(image, channels, f"the image {path}")
    except FileNotFoundError as error:
        if Path(path).is_symlink():
            raise DataError(f"{path} is a broken link") from error
        raise DataError(f"there is no image {path}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder: give image files") from error
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in many ways, by its format
        raise DataError(
            f"cannot read the image {path}: {str(error).rstrip('.')}. Replace the file or remove it"
        ) from error
    return to_pixels(picture, image_size)


def upright(image: Image.Image, channels: int, name: str = "the image") -> Image.Image:
    """Return a picture in grey or RGB, with its EXIF orientation applied.

    Raises:
        DataError: if it has more than 8 bits per channel.
    """
    if image.mode[0] in "IF":
        raise DataError(
            f"{name} has pixels of type {image.mode!r}, more than 8 bits per channel: convert it "
            "to 8 bits first; clipping the values would destroy the image"
        )
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data fail in many ways, and the pixels may be intact
        turn = None
    picture = image if turn is None else image.transpose(turn)
    return picture.convert("L" if channels == 1 else "RGB")


def to_pixels(picture: Image.Image, image_size: int | None) -> Tensor:
    """A grey or RGB picture as :math:`(C, H, W)`, resized as :func:`read_image` says."""
    if image_size is not None and picture.size != (image_size, image_size):
        picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BILINEAR)
    rows = torch.from_numpy(np.array(picture))
    return rows.unsqueeze(0) if rows.ndim == 2 else rows.permute(2, 0, 1).contiguous()


def decode(
    folder: Path, files: Sequence[Path], image_size: int | None, data_dir: Path, part: str
) -> Tensor:
    """The images ``files``, all below ``folder``, as ``uint8`` of shape :math:`(N, 3, H, W)`.

    More than ``IN_MEMORY`` bytes are written to a cache file in ``data_dir/.cache``, or in the
    user's cache folder if that is read-only, and mapped into memory. The cache file's name is a
    hash of ``folder``, ``part``, the image size, ``FORMAT`` and the name, size and time of each
    image file: it is used again while these stay the same, and removed when another one is written
    for the same folder, part and image size.
    """
    shape = (len(files), *read_image(files[0], image_size).shape)
    needed = math.prod(shape)
    if needed <= IN_MEMORY:
        pixels = np.empty(shape, np.uint8)
        for row, image in zip(pixels, _read_all(files, image_size, shape[1:]), strict=True):
            row[...] = image
        return torch.from_numpy(pixels)

    place = _digest([str(folder.resolve()), str(image_size), part])
    stamps = ((file.relative_to(folder), file.stat()) for file in files)
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stamps]
    name = f"{place}-{_digest([str(FORMAT), *lines])}.uint8"
    cache = writable_home(data_dir, ".cache") / ".cache"
    target = cache / name
    for made in (data_dir / ".cache" / name, target):
        if _is_whole(made, needed):
            return _mapped(made, shape)
    with locked(target):
        if not _is_whole(target, needed):  # the process that held the lock may have made it
            with (
                space_for(needed, cache),
                replacing(target) as temporary,
                temporary.open("wb") as output,
            ):
                for image in _read_all(files, image_size, shape[1:]):
                    output.write(image.data)
            for outdated in set(cache.glob(f"{place}-*.uint8")) - {target}:
                outdated.unlink(missing_ok=True)
    return _mapped(target, shape)


def _is_whole(file: Path, needed: int) -> bool:
    return file.is_file() and file.stat().st_size == needed and os.access(file, os.R_OK)


def _mapped(file: Path, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.memmap(file, np.uint8, mode="c", shape=shape))


def _read_all(
    files: Sequence[Path], image_size: int | None, shape: tuple[int, ...]
) -> Iterator[NDArray[np.uint8]]:
    def read(file: Path) -> NDArray[np.uint8]:
        image = read_image(file, image_size)
        if image.shape != shape:
            raise DataError(
                f"the image {file} is {image.shape[2]} pixels wide and {image.shape[1]} high, but "
                f"{files[0]} is {shape[2]} by {shape[1]}: give an image_size for "
                "all (--image-size on the command line)"
            )
        return image.numpy()

    with (
        ThreadPoolExecutor() as pool,
        tqdm(desc="decoding images", total=len(files), unit=" images", disable=None) as bar,
    ):
        for start in range(0, len(files), 1024):  # no more than this many wait in memory
            for image in pool.map(read, files[start : start + 1024]):
                yield image
                bar.update()


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()[:16]
