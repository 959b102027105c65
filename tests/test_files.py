"""Files are written whole or not at all, and one process at a time holds a lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernelnorm.experiments import files
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.files import Lock, remove_parts, replacing, write_atomically
from tests.processes import wait_for

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="files have no locks there")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_replaced_with_its_folder_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        write_atomically(file, content)
        assert file.read_bytes() == content
    assert names(file.parent) == ["file"]


def test_reader_never_sees_a_part(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")
    with replacing(file) as part:
        part.write_bytes(b"half of the n")
        assert file.read_bytes() == b"old"
        part.write_bytes(b"new")
    assert file.read_bytes() == b"new"


def test_content_is_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(stream: int) -> None:
        synced.append(os.fstat(stream).st_size)
        assert not (tmp_path / "file").exists()

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_atomically(tmp_path / "file", b"four")
    assert synced == [4]


def test_block_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")

    def interrupted() -> None:
        with replacing(tmp_path / "file") as part:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*file: .*saved before is intact"):
        write_atomically(tmp_path / "file", b"content")
    assert names(tmp_path) == ["file"]


def test_of_two_that_make_a_folder_the_first_wins(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with replacing(target) as second:
        second.mkdir()
        with replacing(target) as first:
            first.mkdir()
            (first / "file").touch()
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["file"]


def test_parts_of_one_name_or_of_all_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.01234567.part").mkdir()
    (tmp_path / ".a.01234567.part" / "file").touch()
    others = [".a.b.part", "a.01234567.part", "a.tgz.part", "file"]
    for name in (".b.89abcdef.part", *others):
        (tmp_path / name).touch()
    remove_parts(tmp_path, "a")
    assert names(tmp_path) == sorted([".b.89abcdef.part", *others])
    remove_parts(tmp_path)
    assert names(tmp_path) == sorted(others)


@needs_locks
def test_second_holder_is_refused_or_waits(tmp_path: Path) -> None:
    lock, waited = Lock(tmp_path / "lock"), []
    assert not lock.is_held()
    with lock.hold() as held:
        assert held
        assert lock.is_held()
        with pytest.raises(BlockingIOError), lock.hold():
            pass

        def give_up() -> None:
            waited.append("asked")
            raise TimeoutError

        with pytest.raises(TimeoutError), lock.hold(on_wait=give_up):
            pass
    assert waited == ["asked"]
    assert not lock.is_held()
    with lock.hold(on_wait=give_up):
        assert lock.is_held()


@needs_locks
def test_killed_process_gives_its_lock_back(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from kernelnorm.experiments.files import Lock

with Lock(Path(sys.argv[1])).hold():
    print("ready", flush=True)
    sys.stdin.read()
"""
    lock = Lock(tmp_path / "lock")
    with subprocess.Popen(
        [sys.executable, "-c", script, lock.file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"ready"
        assert lock.is_held()
        other.kill()
    wait_for(lambda: not lock.is_held())


@needs_locks
def test_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    lock = Lock(tmp_path / "lock")
    with lock.hold() as first, lock.hold() as second:
        assert not first
        assert not second
        assert not lock.is_held()
