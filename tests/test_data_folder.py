"""Folders of images as people have them."""

import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernelnorm.experiments.data import decode, disk, load_images
from kernelnorm.experiments.data.folder import OWN_SPLIT
from kernelnorm.experiments.errors import DataError


def save(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(path, "PPM" if path.suffix == ".pgm" else None)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes of ten images, each of a shade of its own, and no split."""
    for label, shade in (("cat", 0), ("dog", 100)):
        for i in range(10):
            save(tmp_path / "photos" / label / f"{i}.png", shade + i)
    return tmp_path / "photos"


@pytest.mark.parametrize("name", ["b.jfif", "c.pgm", "d.jpe", "E.PNG", "f.jp2", "deep/er/g.webp"])
def test_any_suffix_that_pillow_reads_at_any_depth(tmp_path: Path, name: str):
    for split in ("train", "val"):
        save(tmp_path / split / "cat" / name)
    assert len(load_images(tmp_path, "train")) == 1


def test_what_is_left_out_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for split in ("train", "val"):
        save(tmp_path / split / "cat" / "a.png")
    for name in ("a.txt", "b.txt", "README", ".hidden", "more/film.mp4"):
        file = tmp_path / "train" / "cat" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    load_images(tmp_path, "train")
    expected = f"left out 4 files that are not images in {tmp_path / 'train'}: "
    assert f"{expected}2 .txt, 1 without suffix, 1 .mp4\n" in capsys.readouterr().err
    load_images(tmp_path, "test")
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"\x01\x00\x00\x02", b"\xff\xff\xff\xff"])
def test_a_damaged_note_of_the_camera_loses_no_picture(tmp_path: Path, damage: bytes):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(buffer, "JPEG", exif=exif)
    for split in ("train", "val"):
        save(tmp_path / split / "cat" / "a.png")
    photo = buffer.getvalue().replace(b"\x01\x0f\x00\x02", damage)
    (tmp_path / "train" / "cat" / "b.jpg").write_bytes(photo)
    assert len(load_images(tmp_path, "train")) == 2


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(tmp_path: Path, turn: int):
    from PIL import ImageOps

    pixels = torch.arange(12, dtype=torch.uint8).view(3, 4).numpy() * 20
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = turn
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = ImageOps.exif_transpose(image)
        assert decode.read_image(tmp_path / "a.png", channels=1)[0].tolist() == (
            np.array(expected).tolist()
        )


def test_a_name_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "IN_MEMORY", 0)
    name = os.fsdecode(b"\xff\xfe.png")
    try:
        save(tmp_path / "train" / "cat" / name)
    except OSError:
        pytest.skip("the file system takes no such names")
    assert len(load_images(tmp_path, "train", data_dir=tmp_path / "data")) == 1


def test_a_folder_without_a_split_gets_one(classes: Path, capsys: pytest.CaptureFixture[str]):
    train, test = load_images(classes, "train"), load_images(classes, "test")
    assert (len(train), len(test)) == (16, 4)
    assert test.labels.tolist() == [0, 0, 1, 1]
    together = torch.cat([train.pixels, test.pixels])[:, 0, 0, 0]
    assert sorted(together.tolist()) == [*range(10), *range(100, 110)]
    assert train.split == test.split == OWN_SPLIT
    assert capsys.readouterr().err.count(OWN_SPLIT) == 1
    assert load_images(classes, "test").fingerprint() == test.fingerprint()


def test_a_class_that_cannot_be_split(classes: Path):
    save(classes / "emu" / "0.png")
    with pytest.raises(DataError, match=r"emu has 1 image: a class needs at least 2"):
        load_images(classes, "train")


def test_a_folder_of_images_without_classes(tmp_path: Path):
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has no folders of classes: a data set is digits"):
        load_images(tmp_path, "train")


@pytest.mark.parametrize("n", [3, 16, 99])
def test_a_subset_decodes_only_what_it_takes(
    classes: Path, n: int, monkeypatch: pytest.MonkeyPatch
):
    expected = load_images(classes, "train").subset(min(n, 16))
    read: list[Path] = []
    whole = decode.read_image
    monkeypatch.setattr(
        decode, "read_image", lambda file, *rest: read.append(file) or whole(file, *rest)
    )
    images = load_images(classes, "train", subset=n)
    assert images.labels.tolist() == expected.labels.tolist()
    assert torch.equal(images.pixels, expected.pixels)
    assert len(set(read)) == min(n, 16)


def test_subsets_and_splits_have_files_of_their_own(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode, "IN_MEMORY", 0)
    for _ in range(2):
        for subset in (None, 4):
            for split in ("train", "test"):
                load_images(classes, split, subset=subset, data_dir=tmp_path)
    assert len([*(tmp_path / ".cache").glob("*.uint8")]) == 4


def test_a_shared_data_folder_whose_cache_another_user_has_made(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode, "IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    load_images(classes, "train", data_dir=tmp_path)
    access = os.access
    monkeypatch.setattr(
        disk.os,
        "access",
        lambda path, mode: (
            access(path, mode) and not (mode == os.W_OK and Path(path).name == ".cache")
        ),
    )
    load_images(classes, "train", data_dir=tmp_path)  # can read what is there
    assert not (tmp_path / "own").exists()
    load_images(classes, "test", data_dir=tmp_path)  # and makes the rest elsewhere
    assert len([*(tmp_path / "own").rglob("*.uint8")]) == 1


def test_a_fingerprint_of_many_pixels_samples_them_unless_it_is_whole(
    classes: Path, monkeypatch: pytest.MonkeyPatch
):
    images = load_images(classes, "train")
    other = replace(images, pixels=images.pixels.clone())
    other.pixels[1] += 1
    monkeypatch.setattr(
        "kernelnorm.experiments.data.images.FINGERPRINTED", images.pixels[0].numel()
    )
    assert other.fingerprint() == images.fingerprint()
    assert other.fingerprint(whole=True) != images.fingerprint(whole=True)


def test_a_fingerprint_tells_images_and_not_places(classes: Path):
    before = load_images(classes, "train").fingerprint()
    moved = classes.rename(classes.with_name("elsewhere"))
    assert load_images(moved, "train").fingerprint() == before
    for file in (moved / "cat").iterdir():
        save(file, 50)
    assert load_images(moved, "train").fingerprint() != before
