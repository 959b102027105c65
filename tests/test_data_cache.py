"""Decoded images in the cache: read again, replaced when a file changes, never half written."""

import os

import pytest
import torch

from kernelnorm.experiments import files
from kernelnorm.experiments.data import decode, disk, load_images
from kernelnorm.experiments.errors import DataError
from tests.pictures import save, two_classes


@pytest.fixture
def folder(tmp_path):
    return two_classes(tmp_path / "pictures")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(decode, "IN_MEMORY", 0)


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded."""
    names, read = [], decode.read_image
    monkeypatch.setattr(
        decode, "read_image", lambda path, *a: (names.append(path.name), read(path, *a))[1]
    )
    return names


def cached(home):
    return [path.name for path in (home / ".cache").iterdir()]


def test_same_pixels_as_in_memory(folder, tmp_path, monkeypatch):
    mapped = load_images(folder, "train", data_dir=tmp_path)
    monkeypatch.setattr(decode, "IN_MEMORY", 1 << 20)
    assert torch.equal(mapped.pixels, load_images(folder, "train").pixels)


def test_is_used_again(folder, tmp_path, decoded):
    first = load_images(folder, "train", data_dir=tmp_path)
    del decoded[:]
    again = load_images(folder, "train", data_dir=tmp_path)
    assert decoded == ["0.png"]  # for the shape
    assert torch.equal(first.pixels, again.pixels)


def test_splits_and_sizes_lie_beside_each_other(folder, tmp_path):
    for split, size in (("train", None), ("test", None), ("train", 4)):
        load_images(folder, split, data_dir=tmp_path, image_size=size)
    assert len(cached(tmp_path)) == 3


@pytest.mark.parametrize("change", ["content", "time", "more", "fewer"])
def test_is_replaced_when_a_file_changes(folder, tmp_path, change):
    load_images(folder, "train", data_dir=tmp_path)
    before = cached(tmp_path)
    file = folder / "train" / "bees" / "1.png"
    if change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "fewer":
        file.unlink()
    else:
        save(file if change == "content" else file.with_name("2.png"), (1, 2, 3))
    pixels = load_images(folder, "train", data_dir=tmp_path).pixels
    assert len(pixels) == {"more": 5, "fewer": 3}.get(change, 4)
    assert len(cached(tmp_path)) == 1
    assert cached(tmp_path) != before


def test_is_replaced_when_its_format_changes(folder, tmp_path, monkeypatch, decoded):
    load_images(folder, "train", data_dir=tmp_path)
    before = cached(tmp_path)
    monkeypatch.setattr(decode, "FORMAT", decode.FORMAT + 1)
    del decoded[:]
    load_images(folder, "train", data_dir=tmp_path)
    assert len(decoded) == 5  # one of them for the shape
    assert len(cached(tmp_path)) == 1
    assert cached(tmp_path) != before


def test_is_on_the_disk_before_it_has_its_name(folder, tmp_path, monkeypatch):
    synced = []

    def fsync(file):
        synced.append(os.fstat(file).st_size)
        assert not list((tmp_path / ".cache").glob("[!.]*.uint8"))

    monkeypatch.setattr(files.os, "fsync", fsync)
    load_images(folder, "train", data_dir=tmp_path)
    assert synced == [4 * 3 * 10 * 12]


def test_killed_decoding_is_cleared_away(folder, tmp_path):
    load_images(folder, "train", data_dir=tmp_path)
    (name,) = cached(tmp_path)
    (tmp_path / ".cache" / name).unlink()
    (tmp_path / ".cache" / f".{name}.01234567.part").write_bytes(b"half")
    load_images(folder, "train", data_dir=tmp_path)
    assert cached(tmp_path) == [name]


def test_interrupted_decoding_leaves_nothing(folder, tmp_path):
    (folder / "train" / "bees" / "9.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"9\.png"):
        load_images(folder, "train", data_dir=tmp_path)
    assert cached(tmp_path) == []


def test_writing_to_the_pixels_leaves_the_file_alone(folder, tmp_path):
    load_images(folder, "train", data_dir=tmp_path).pixels.zero_()
    assert load_images(folder, "train", data_dir=tmp_path).pixels.any()


def test_full_disk(folder, tmp_path, monkeypatch):
    usage = disk.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"no disk space in .*\.cache: .* MB are needed"):
        load_images(folder, "train", data_dir=tmp_path)


def test_disk_that_fills_up_on_the_way(tmp_path):
    with (
        pytest.raises(DataError, match="no disk space"),
        disk.space_for(1, tmp_path),
    ):
        raise OSError(disk.errno.ENOSPC, "No space left on device")


def test_other_errors_of_the_disk_are_left_as_they_are(tmp_path):
    with pytest.raises(PermissionError), disk.space_for(1, tmp_path):
        raise PermissionError


def test_no_folder_can_be_written(tmp_path):
    """No cache folder can be made below a file."""
    (tmp_path / "home").write_bytes(b"")
    target = tmp_path / "home" / "cache" / "pixels"
    for block in (disk.locked(target), disk.space_for(1, target)):
        with (
            pytest.raises(DataError, match=r"cannot write to .*: Not a directory\. .*XDG_CACHE"),
            block,
        ):
            pass


def test_read_only_data_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(disk.os, "access", lambda path, _: path != folder)
    load_images(folder, "train", data_dir=folder)
    assert len(cached(tmp_path / "home" / "kernelnorm")) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["train", "val"]
