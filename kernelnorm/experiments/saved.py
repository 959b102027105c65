"""Writes files of ``torch.save`` atomically, and verifies their checksums when reading them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from kernelnorm.experiments.files import write_atomically

__all__ = ["load_checked", "save_atomically"]


def save_atomically(file: Path, value: Any) -> None:
    """Write a value atomically: a reader sees either the old file or the new one, never a part.

    Raises:
        RunError: the file cannot be written; its old content is intact.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(file, buffer.getbuffer())


def load_checked(file: Path) -> Any:
    """Return the value in a file, with its tensors on the CPU.

    ``torch.load`` alone does not verify checksums: it would return damaged numbers.

    Raises:
        Exception: the file is missing or damaged; the type depends on the damage.
    """
    with ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(file, map_location="cpu", weights_only=True)
