"""What ``torch.save`` wrote: replaced as a whole, read with its checksums compared."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from kernelnorm.experiments.files import write_atomically

__all__ = ["load_checked", "save_atomically"]


def save_atomically(file: Path, value: Any) -> None:
    """Write a file such that a reader sees the old value or the new one, whole.

    Raises:
        RunError: the file cannot be written; what was there before is intact.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(file, buffer.getbuffer())


def load_checked(file: Path) -> Any:
    """Return what a file holds, on the CPU.

    ``torch.load`` alone takes bits that have changed on the disk for numbers.

    Raises:
        Exception: the file is missing or damaged; it can fail in every layer of the reader.
    """
    with ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(file, map_location="cpu", weights_only=True)
