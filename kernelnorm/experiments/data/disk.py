"""Where data is written, on a disk that may be full, read-only or shared with other processes."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from kernelnorm.experiments.errors import DataError
from kernelnorm.experiments.files import Lock, remove_parts
from kernelnorm.experiments.machine import user_cache


def writable_home(data_dir: Path, subfolder: str = "") -> Path:
    """``data_dir`` if its subfolder can be made or written to; else the user's cache folder.

    A shared data folder may belong to one user and be read-only for the others.

    Raises:
        DataError: ``data_dir`` is a file.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise DataError(f"the data folder {data_dir} is not a folder; name one, existing or new")
    target = data_dir.absolute() / subfolder
    nearest = next((p for p in (target, *target.parents) if p.exists()), target)
    if os.access(nearest, os.W_OK):
        return data_dir
    return user_cache()


@contextmanager
def space_for(needed: int, folder: Path) -> Iterator[None]:
    """Make ``folder`` for a block that writes ``needed`` bytes.

    Raises:
        DataError: the folder cannot be made, or the disk has too little space, before or during
            the block.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    free = shutil.disk_usage(folder).free
    message = (
        f"no disk space in {folder}: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB were "
        "free at the start. Make room, or name a data folder on another disk"
    )
    if free < needed:
        raise DataError(message)
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(message) from error
        raise


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Let one process at a time make ``target``; remove unfinished ones of killed processes.

    The other processes wait, and should then check whether ``target`` exists. If the file system
    has no locks, no process waits and nothing is removed.

    Raises:
        DataError: the folder of ``target`` cannot be made or written to.
    """

    def say() -> None:
        tqdm.write(f"waiting for another process, which makes {target}", file=sys.stderr)

    lock = Lock(target.with_name(f".lock-{target.name}"))
    with ExitStack() as stack:
        try:
            held = stack.enter_context(lock.hold(on_wait=say))
        except OSError as error:
            raise _not_writable(target.parent, error) from error
        if held:
            remove_parts(target.parent, target.name)
        try:
            yield
        finally:
            lock.file.unlink(missing_ok=True)


def _not_writable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write to {folder}: {error.strerror}. Name a data folder that is writable, or let "
        "XDG_CACHE_HOME name one for the cache"
    )
