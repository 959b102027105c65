"""Runs that start from the weights of others."""

from __future__ import annotations

import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from PIL import Image

from kernelnorm.cli import main
from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.networks import read_weights
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.trainer import train
from tests.small_runs import assert_same, command, on, photos, run, small, weights


def test_of_the_same_classes_all_weights_are_taken(tmp_path: Path) -> None:
    run(tmp_path / "first")
    folder = run(tmp_path / "second", init_from=tmp_path / "first", lr=1e-30)
    assert_same(weights(tmp_path / "first", "best.ckpt"), weights(folder.path))
    assert folder.read_config()["run"]["init_from"]
    assert small().name != RunConfig.from_dict(folder.read_config()["run"]).name


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_files(tmp_path: Path, key: str | None) -> None:
    tensors = weights(run(tmp_path / "first").path)
    torch.save(tensors if key is None else {key: tensors}, tmp_path / "weights.pt")
    run(tmp_path / "second", init_from=tmp_path / "weights.pt", lr=1e-30)
    assert_same(tensors, weights(tmp_path / "second"))


def test_another_number_of_classes(tmp_path: Path) -> None:
    first = photos(tmp_path / "photos")
    train(on(first), Launch(out=tmp_path / "first", verbose=False))
    for split in ("train", "val"):
        (first / split / "dog").rename(first / split / "a dog")
        file = first / split / "emu" / "0.png"
        file.parent.mkdir()
        Image.new("RGB", (8, 8), (9, 9, 9)).save(file)
    source = tmp_path / "first"
    config = on(first, init_from=read_weights(source).fingerprint(), lr=1e-30, seed=3)
    train(config, Launch(out=tmp_path / "more", verbose=False, init_from=source))
    old, new = weights(source, "best.ckpt"), weights(tmp_path / "more")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if len(new[name]) != len(old[name])}
    assert len(changed) == 2


def test_weights_of_another_network(tmp_path: Path) -> None:
    run(tmp_path / "first", norm="batch")
    message = (
        r"of another network: .* is missing there, .* more\. They are of a run with --model "
        r"vgg8 --norm batch --model-options "
        r"'\{\"width\": 0.125\}', on images with 1 colour channel"
    )
    with pytest.raises(RunError, match=message):
        run(tmp_path / "second", init_from=tmp_path / "first")
    torch.save(weights(tmp_path / "first"), tmp_path / "weights.pt")
    with pytest.raises(RunError, match=r"more\. Give the --model, --norm and --model-options"):
        run(tmp_path / "third", init_from=tmp_path / "weights.pt")


def test_damaged_weights(tmp_path: Path) -> None:
    file = run(tmp_path / "first").path / "best.ckpt"
    with ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + 512] ^= 1
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)  # PyTorch alone does not see it
    with pytest.raises(RunError, match=r"best\.ckpt holds no weights that can be read safely"):
        read_weights(tmp_path / "first")


def test_a_run_that_has_begun_resumes_without_them(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(first)
    options = [*command(second, "kernel")[3:], f"--init-from={first}"]
    main([*options, "--max-steps=1"])
    (first / "best.ckpt").unlink()
    main(options)
    assert len(RunFolder(second).read_metrics()) == 2
    with pytest.raises(SystemExit, match="cannot read weights from"):
        main([*command(tmp_path / "third", "kernel")[3:], f"--init-from={first}"])


def test_a_run_that_has_begun_resumes_with_the_weights_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(first)
    options = [*command(second, "kernel")[3:], f"--init-from={first}"]
    main([*options, "--max-steps=1"])
    run(first, epochs=3)
    run(tmp_path / "other", seed=4)
    shutil.copy(tmp_path / "other" / "best.ckpt", first)
    main(options)
    assert f"warning: {second} started from other weights than {first}." in capsys.readouterr().out
    assert len(RunFolder(second).read_metrics()) == 2


def test_sparse_weights(tmp_path: Path) -> None:
    torch.save({"linear.weight": torch.eye(3).to_sparse()}, tmp_path / "weights.pt")
    with pytest.raises(RunError, match=r"linear.weight in .* is torch.sparse.FloatTensor"):
        read_weights(tmp_path / "weights.pt")


def test_weights_of_a_run_without_the_shape_of_its_images(tmp_path: Path) -> None:
    folder = run(tmp_path / "first", norm="batch")
    content = folder.read_config()
    del content["image_shape"]
    folder.write_config(content)
    with pytest.raises(RunError, match=r"'\{\"width\": 0.125\}'$"):
        run(tmp_path / "second", init_from=tmp_path / "first")


def test_a_stopped_run_resumes_without_taking_them_again(tmp_path: Path) -> None:
    run(tmp_path / "first")
    run(tmp_path / "whole", epochs=2, init_from=tmp_path / "first")
    run(tmp_path / "stopped", epochs=1, init_from=tmp_path / "first")
    run(tmp_path / "stopped", epochs=2, init_from=tmp_path / "first")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_files_without_weights(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "weights.pt"
    if content is None:
        torch.save({"epoch": 3}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(RunError, match=r"weights\.pt"):
        read_weights(file)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read weights from .*best\.ckpt"):
        read_weights(tmp_path)
