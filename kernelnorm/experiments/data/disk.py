"""Files and folders that appear whole or not at all, on a disk that may be full or read-only."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

from kernelnorm.experiments.data.images import DataError

if sys.platform != "win32":
    import fcntl


def writable_home(data_dir: Path, subfolder: str = "") -> Path:
    """``data_dir`` if it and its subfolder can be written to; else the user's cache folder.

    A group's data folder may have been made by one of them, and be closed to the others.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise DataError(f"the data folder {data_dir} is not a folder; name one, existing or new")
    target = data_dir.absolute() / subfolder
    nearest = next(p for p in (target, *target.parents) if p.exists())
    if os.access(nearest, os.W_OK):
        return data_dir
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernelnorm"


@contextmanager
def space_for(needed: int, folder: Path) -> Iterator[None]:
    """Make ``folder`` for a block that writes ``needed`` bytes; say so if the disk is too full."""
    folder.mkdir(parents=True, exist_ok=True)
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
    """Let one process at a time make ``target``, and remove what killed ones have left of it.

    The others wait, and should then look whether it is there. Where files cannot be locked, which
    is on Windows and on some network disks, nobody waits and nothing is removed.
    """
    if sys.platform == "win32":
        yield
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".lock-{target.name}")
    with ExitStack() as stack:
        lock = stack.enter_context(path.open("ab"))
        while (held := _hold(lock, target)) and not os.fstat(lock.fileno()).st_nlink:
            lock = stack.enter_context(path.open("ab"))  # the process before has removed the other
        stack.callback(path.unlink, missing_ok=True)
        if held:
            for left in target.parent.glob(f".partial-{target.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _hold(lock: IO[bytes], target: Path) -> bool:
    """Wait for ``lock``, which closing it gives back; ``False`` if it cannot be locked."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        tqdm.write(f"waiting for another process, which makes {target}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextmanager
def replacing(target: Path, needed: int) -> Iterator[Path]:
    """Yield a path for a file or folder that becomes ``target`` if the block succeeds.

    If the block fails, nothing is left; if it is killed, the next :func:`locked` removes the rest.
    Where two processes make the same folder, the first wins.
    """
    with (
        space_for(needed, target.parent),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".partial-{target.name}-") as folder,
    ):
        temporary = Path(folder) / target.name
        yield temporary
        try:
            temporary.replace(target)
        except OSError:
            if not target.is_dir():
                raise
