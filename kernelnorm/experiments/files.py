"""Atomic writes and locks."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from kernelnorm.experiments.errors import RunError

if sys.platform != "win32":
    import fcntl

__all__ = ["Lock", "is_part", "remove_parts", "replacing", "write_atomically"]


def write_atomically(file: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: a reader sees either the old content or the new one, never a part.

    Raises:
        RunError: the file cannot be written; its old content is intact.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_bytes(content)
    except OSError as error:
        raise RunError(
            f"cannot write {file}: {error.strerror}. What was saved before is intact: "
            "solve this problem, then run the same command to resume"
        ) from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path for a file or folder, which is renamed to ``target`` if the block succeeds.

    If the block fails, nothing is left. If the process is killed, ``.TARGET.*.part`` is left for
    :func:`remove_parts`. If two processes make the same folder, the one that is renamed first is
    kept.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        _sync(part)
        try:
            part.replace(target)
        except OSError:
            if not (part.is_dir() and target.is_dir()):
                raise
    finally:
        _remove(part)


def remove_parts(folder: Path, name: str | None = None) -> None:
    """Remove the unfinished files and folders that killed processes have left.

    Args:
        folder: the folder to clean.
        name: removes only unfinished writes of the file or folder ``name``; ``None``: of all.
    """
    for part in folder.glob(".*.part"):
        if is_part(part.name, name):
            _remove(part)


def is_part(found: str, name: str | None = None) -> bool:
    """Tell whether ``found`` is the name of an unfinished write of ``name``, or of any file."""
    target = ".+" if name is None else re.escape(name)
    return bool(re.fullmatch(rf"\.{target}\.[0-9a-f]{{8}}\.part", found))


class Lock:
    """A lock file, which one process holds at a time.

    Windows and some network file systems have no such locks: there, it keeps no process out.

    Args:
        file: the lock file. It is created by :meth:`hold`; its holder may remove it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    @contextmanager
    def hold(self, on_wait: Callable[[], object] | None = None) -> Iterator[bool]:
        """Hold the lock during a block.

        Args:
            on_wait: is called before waiting for the process that holds the lock; ``None``: raise
                an error instead of waiting.

        Yields:
            whether the file system has locks.

        Raises:
            BlockingIOError: another process holds the lock, and ``on_wait`` is not given.
            OSError: the lock file cannot be opened.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            yield False
            return
        with ExitStack() as stack:
            stream = stack.enter_context(self.file.open("ab"))
            # The previous holder may have removed the file: then lock the new one at its path.
            while (held := _take(stream, on_wait)) and not os.fstat(stream.fileno()).st_nlink:
                stream = stack.enter_context(self.file.open("ab"))
            yield held

    def is_held(self) -> bool:
        """Tell whether a process holds the lock."""
        try:
            with self.file.open("rb") as stream:
                if sys.platform != "win32":
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no such file, or a file system without locks
            pass
        return False


def _take(stream: IO[bytes], on_wait: Callable[[], object] | None) -> bool:
    """Lock a file until it is closed; ``False`` where files cannot be locked."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if on_wait is None:
            time.sleep(0.1)  # is_held() holds the lock for a moment
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            on_wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _sync(place: Path) -> None:
    """Wait until a file or folder is on the disk: after a power cut a renamed file is complete."""
    if place.is_file():
        with place.open("rb+") as stream:
            os.fsync(stream.fileno())
    elif sys.platform != "win32":
        os.sync()


def _remove(place: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()
