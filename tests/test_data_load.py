"""Loading: every data set becomes the right pixels, or an error that says what to do."""

import os
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from kernelnorm.experiments.data import Images, decode, load, load_images
from kernelnorm.experiments.errors import DataError
from tests.pictures import GREEN, RED, save, two_classes


@pytest.fixture
def folder(tmp_path):
    return two_classes(tmp_path / "pictures")


def test_folder_gives_pixels_labels_and_classes(folder):
    train, test = load_images(folder, "train"), load_images(str(folder), "test")
    assert train.classes == test.classes == ("ants", "bees")
    assert train.pixels.shape == (4, 3, 10, 12)
    assert train.pixels.dtype == torch.uint8
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert test.labels.tolist() == [1]
    assert (train.pixels[:2].amax((0, 2, 3)) == torch.tensor(RED)).all()
    assert (test.pixels.amin((0, 2, 3)) == torch.tensor(GREEN)).all()


def test_the_folder_with_test_images_may_be_called_test(folder):
    (folder / "val").rename(folder / "test")
    assert len(load_images(folder, "test")) == 1


def test_of_val_and_test_val_is_taken(folder):
    for i in range(3):
        save(folder / "test" / "ants" / f"{i}.png")
    assert load_images(folder, "test").labels.tolist() == [1]


def test_loading_writes_nothing_for_small_data(folder, tmp_path):
    load_images(folder, "train", data_dir=tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_images_are_resized_and_their_longer_side_is_cut(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = 10, 120, 250
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "train" / "a" / "wide.png")
    pixels = load_images(tmp_path, "train", image_size=10).pixels
    assert pixels.shape == (1, 3, 10, 10)
    assert (pixels[..., 1:-1] == 120).all()


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg")],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix):
    save(tmp_path / "train" / "a" / f"x.{suffix}", (255, 255, 255), mode=mode)
    pixels = load_images(tmp_path, "train").pixels
    assert pixels.shape[1] == 3
    assert pixels.min() > 252


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_are_turned_upright(tmp_path, suffix):
    half = Image.new("RGB", (16, 8), RED)
    half.paste(GREEN, (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    half.save(tmp_path / f"a.{suffix}", exif=exif)
    for size, shape in ((None, (3, 16, 8)), (8, (3, 8, 8))):
        pixels = decode.read_image(tmp_path / f"a.{suffix}", size).int()
        assert pixels.shape == shape
        assert pixels[0, 0].min() > 200
        assert pixels[1, -1].min() > 200


def test_read_image_can_give_one_channel(tmp_path):
    file = save(tmp_path / "a.png", (50, 50, 50))
    assert decode.read_image(file, 5, channels=1).unique().tolist() == [50]
    assert decode.read_image(file, 5, channels=1).shape == (1, 5, 5)


class TestFolderErrors:
    def test_not_a_folder(self, tmp_path):
        with pytest.raises(
            DataError, match=r"nowhere is not a folder: a data set is digits, cifar"
        ):
            load_images(tmp_path / "nowhere", "train")

    def test_no_test_folder(self, folder):
        (folder / "val").rename(folder / "validation")
        with pytest.raises(DataError, match="pictures lacks the folder val or test"):
            load_images(folder, "test")

    def test_unknown_class(self, folder):
        save(folder / "val" / "wasps" / "0.png")
        with pytest.raises(DataError, match=r"class 'wasps' that .*train has not.* ants, bees\."):
            load_images(folder, "test")

    def test_empty_class(self, folder):
        (folder / "train" / "wasps").mkdir()
        with pytest.raises(DataError, match=r"class folder .*wasps has no images that can be read"):
            load_images(folder, "train")

    def test_no_classes(self, tmp_path):
        (tmp_path / "train").mkdir()
        with pytest.raises(DataError, match="train has no class folders: expected"):
            load_images(tmp_path, "train")

    @pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
    def test_corrupt_image_is_named(self, folder, damage):
        file = save(folder / "train" / "ants" / "9.jpg")
        whole = file.read_bytes()
        file.write_bytes({"truncated": whole[:-90], "text": b"<html>", "empty": b""}[damage])
        with pytest.raises(DataError, match=r"cannot read the image .*ants.9\.jpg: .*Replace"):
            load_images(folder, "train")

    @pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError])
    def test_any_error_of_a_decoder_names_the_image(self, folder, monkeypatch, error):
        def fail(*_):
            raise error("Missing or empty image item")

        monkeypatch.setattr(decode, "upright", fail)
        with pytest.raises(DataError, match=r"cannot read the image .*\.png: Missing or empty"):
            load_images(folder, "train")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
    def test_a_pipe_is_not_waited_for(self, folder):
        os.mkfifo(folder / "train" / "ants" / "9.png")
        with pytest.raises(DataError, match=r"9\.png is a pipe: give image files"):
            load_images(folder, "train")

    def test_images_of_different_sizes(self, folder):
        save(folder / "train" / "ants" / "9.png", size=(30, 20))
        with pytest.raises(DataError, match=r"9\.png is 30 pixels wide and 20 high.*--image-size"):
            load_images(folder, "train")
        assert load_images(folder, "train", image_size=8).pixels.shape == (5, 3, 8, 8)

    def test_more_than_8_bits(self, folder):
        Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(folder / "train" / "ants" / "9.png")
        with pytest.raises(DataError, match=r"9\.png has pixels of type 'I;16', more than 8 bits"):
            load_images(folder, "train")

    def test_split_and_size(self, folder):
        with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
            load_images(folder, "val")
        with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
            load_images(folder, "train", image_size=0)


def test_data_dir_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the data folder .*file is not a folder"):
        load_images("cifar10", "train", data_dir=tmp_path / "file")


class TestDigits:
    def test_split_is_complete_stratified_and_stable(self):
        train, test = load_images("digits", "train"), load_images("digits", "test")
        assert len(train) + len(test) == 1797
        counts = torch.stack([part.labels.bincount(minlength=10) for part in (train, test)])
        assert ((counts[1] / counts.sum(0) - 0.2).abs() < 0.01).all()
        assert torch.equal(train.pixels, load_images("digits", "train").pixels)
        both = torch.cat([train.pixels, test.pixels]).flatten(1)
        assert both.unique(dim=0).shape[0] == 1797

    def test_pixels_fill_the_range(self):
        train = load_images("digits", "train")
        assert train.pixels.shape[1:] == (1, 8, 8)
        assert train.pixels.unique().tolist() == [round(i * 255 / 16) for i in range(17)]

    def test_can_be_resized(self):
        assert load_images("digits", "test", image_size=32).pixels.shape[1:] == (1, 32, 32)


class TestCifar10:
    @pytest.fixture
    def data_dir(self, tmp_path, monkeypatch):
        monkeypatch.setattr(load, "CIFAR10_RECORDS", 2)
        (tmp_path / "cifar-10-batches-bin").mkdir()
        for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
            record = np.arange(3072) // 16 + i
            content = np.array([[i, *record], [9, *record[::-1]]], np.uint8)
            content.tofile(tmp_path / "cifar-10-batches-bin" / name)
        return tmp_path

    def test_records_are_read_as_published(self, data_dir):
        train = load_images("cifar10", "train", data_dir=data_dir)
        test = load_images("cifar10", "test", data_dir=data_dir)
        assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
        assert test.labels.tolist() == [5, 9]
        assert test.classes[5] == "dog"
        assert test.pixels.shape == (2, 3, 32, 32)
        channel, row, column = 2, 31, 30
        assert (
            test.pixels[0, channel, row, column] == (channel * 1024 + row * 32 + column) // 16 + 5
        )
        assert load_images("cifar10", "test", data_dir=data_dir, image_size=8).pixels.shape[-1] == 8

    def test_resizing_shows_progress_and_holds_one_image_at_a_time(self, data_dir, monkeypatch):
        resized, alive, bars = [], [], []

        def to_pixels(*args):
            alive.append(sum(image() is not None for image in resized))
            image = decode.to_pixels(*args)
            resized.append(weakref.ref(image))
            return image

        def tqdm(images, **kwargs):
            bars.append((kwargs["desc"], len(images)))
            return images

        monkeypatch.setattr(load, "to_pixels", to_pixels)
        monkeypatch.setattr(load, "tqdm", tqdm)
        images = load_images("cifar10", "train", data_dir=data_dir, image_size=8)
        small = load_images("cifar10", "train", data_dir=data_dir)
        picture = Image.fromarray(small.pixels[7].permute(1, 2, 0).numpy())
        assert torch.equal(images.pixels[7], decode.to_pixels(picture, 8))
        assert len(alive) == 10
        assert max(alive) <= 1
        assert bars == [("resizing images", 10)]

    @pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
    def test_truncated_or_missing_file_is_named(self, data_dir, name):
        file = data_dir / "cifar-10-batches-bin" / name
        split = "test" if "test" in name else "train"
        file.write_bytes(file.read_bytes()[:-1])
        message = rf"{name} is missing or truncated: it has 6,145 bytes, expected 6,146"
        with pytest.raises(DataError, match=message):
            load_images("cifar10", split, data_dir=data_dir)
        file.unlink()
        with pytest.raises(DataError, match="it has 0 bytes"):
            load_images("cifar10", split, data_dir=data_dir)

    def test_folder_of_images_is_taken_as_well(self, tmp_path, capsys):
        for name in load.CIFAR10_CLASSES:
            save(tmp_path / "cifar10" / "train" / name / "0.png", size=(32, 32))
        for data_dir in (tmp_path, tmp_path / "cifar10"):
            images = load_images("cifar10", "train", data_dir=data_dir)
            assert images.classes == load.CIFAR10_CLASSES
            message = "train has 10 images of 10 classes, but cifar10 was published with 50,000"
            assert message in capsys.readouterr().err

    def test_folder_of_other_images_is_not_taken(self, folder):
        with pytest.raises(DataError, match=r"cifar10 is not in .*images of 10 classes in train"):
            load_images("cifar10", "train", data_dir=folder, download=False)


class TestSubset:
    images = Images(
        torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1),
        torch.tensor([1, 1, 1, 0, 1, 0, 2, 1, 1]),
        ("a", "b", "c"),
    )

    @pytest.mark.parametrize(
        ("n", "expected"),
        [(0, []), (3, [0, 3, 6]), (5, [0, 1, 3, 5, 6]), (6, [0, 1, 2, 3, 5, 6]), (9, [*range(9)])],
    )
    def test_takes_the_first_of_each_class_evenly(self, n, expected):
        part = self.images.subset(n)
        assert part.pixels.flatten().tolist() == expected
        assert torch.equal(part.labels, self.images.labels[expected])
        assert len(part) == n

    def test_too_many(self):
        with pytest.raises(ValueError, match="n must be between 0 and 9, got 10"):
            self.images.subset(10)
