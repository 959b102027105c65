"""Runs are loaded, extended, moved, and started from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

import kernelnorm as kn
from kernelnorm.cli import main
from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.data import load_images
from kernelnorm.experiments.errors import DataError, RunError
from kernelnorm.experiments.evaluation import evaluate, predict
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.networks import read_weights
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.trainer import train
from tests.small_runs import command

SMALL: dict[str, Any] = {
    "batch_size": 8,
    "epochs": 1,
    "subset": 40,
    "image_size": 8,
    "norm": "kernel",
    "model_options": {"width": 0.125},
}


def small(**choices: Any) -> RunConfig:
    return configure(recipe_for("digits-vgg8"), **{**SMALL, **choices})


def run(out: Path, **choices: Any) -> RunFolder:
    init_from = choices.pop("init_from", None)
    if init_from is not None:
        choices["init_from"] = read_weights(init_from).fingerprint()
    return train(small(**choices), Launch(out=out, verbose=False, init_from=init_from))


def weights(out: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    state = RunFolder(out).load(name)
    assert state is not None
    return dict(state["model"])


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(x, b[name]) for name, x in a.items())


def photos(root: Path, size: int = 8, label: str = "cat", test_size: int | None = None) -> Path:
    rng = np.random.default_rng(0)
    for split, pixels in (("train", size), ("val", test_size or size)):
        for name in (label, "dog"):
            for i in range(8):
                file = root / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                shape = (pixels, pixels, 3)
                Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(file)
    return root


def on(dataset: Path, **choices: Any) -> RunConfig:
    values = {**SMALL, "subset": None, "image_size": None, "lr": 0.01, **choices}
    return configure(recipe_for(model="vgg8", dataset=dataset), **values)


class TestLoad:
    def test_network_preprocessing_and_classes(self, tmp_path: Path) -> None:
        run(tmp_path / "run")
        trained = kn.load(tmp_path / "run")
        assert not trained.network.training
        assert trained.classes == tuple(str(digit) for digit in range(10))
        assert_same(dict(trained.network.state_dict()), weights(tmp_path / "run", "best.ckpt"))
        pixels = load_images("digits", "test").pixels[3]
        x = trained.preprocess(pixels)
        with pytest.raises(DataError, match="the image has pixels of type 'I;16', more than 8 bit"):
            trained.preprocess(Image.new("I;16", (8, 8)))
        assert (x.shape, x.dtype, x.max() <= 1) == ((1, 1, 8, 8), torch.float32, True)
        picture = Image.fromarray(pixels[0].numpy())
        picture.save(tmp_path / "digit.png")
        for image in (picture, picture.convert("RGB"), tmp_path / "digit.png"):
            assert torch.equal(trained.preprocess(image), x)
        with torch.no_grad():
            scores = trained.network(x).softmax(1)[0]
        best, score = predict(tmp_path / "run", [tmp_path / "digit.png"], top=1)[0][0]
        assert best == trained.classes[scores.argmax()]
        assert score == pytest.approx(float(scores.max()), rel=1e-4)

    def test_last_and_other_checkpoints(self, tmp_path: Path) -> None:
        run(tmp_path, epochs=2)
        assert_same(dict(kn.load(tmp_path, "last").network.state_dict()), weights(tmp_path))
        with pytest.raises(ValueError, match="checkpoint must be 'best' or 'last', got 'first'"):
            kn.load(tmp_path, "first")  # type: ignore[arg-type]

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="there is no folder"):
            kn.load(tmp_path / "runs")
        run(tmp_path / "runs" / "one")
        with pytest.raises(RunError, match=r"no config\.yaml, but .* \(1\), such as one"):
            kn.load(tmp_path / "runs")

    def test_weights_of_another_network(self, tmp_path: Path) -> None:
        folder = run(tmp_path)
        folder.save("best.ckpt", {"model": {"x": torch.ones(1)}})
        with pytest.raises(RunError, match=r"best.ckpt does not fit the run"):
            kn.load(tmp_path)

    def test_an_image_of_another_size(self, tmp_path: Path) -> None:
        run(tmp_path)
        with pytest.raises(RunError, match=r"must be uint8 with 1 channels, 8 pixels wide and 8"):
            kn.load(tmp_path).preprocess(torch.zeros(3, 8, 8, dtype=torch.uint8))

    def test_kernelnorm_has_no_other_lazy_names(self) -> None:
        with pytest.raises(AttributeError, match="has no attribute 'laod'"):
            kn.laod  # noqa: B018

    def test_weights_are_contiguous(self, tmp_path: Path) -> None:
        run(tmp_path)
        for name in ("best.ckpt", "last.ckpt"):
            assert all(x.is_contiguous() for x in weights(tmp_path, name).values())


class TestExtend:
    def test_an_extended_run_is_as_if_it_had_been_longer_from_the_start(
        self, tmp_path: Path
    ) -> None:
        run(tmp_path / "long", epochs=3)
        run(tmp_path / "short", epochs=1)
        folder = run(tmp_path / "short", epochs=3)
        assert_same(weights(tmp_path / "long"), weights(tmp_path / "short"))
        content = folder.read_config()
        assert content["run"]["epochs"] == 3
        assert content["extended"] == [{"after": 1, "to": 3}]
        run(tmp_path / "short", epochs=4)
        assert folder.read_config()["extended"] == [{"after": 1, "to": 3}, {"after": 3, "to": 4}]
        assert len(folder.read_metrics()) == 4

    def test_a_run_cannot_be_cut_short(self, tmp_path: Path) -> None:
        run(tmp_path, epochs=2)
        before = (tmp_path / "last.ckpt").read_bytes()
        with pytest.raises(RunError, match="a run of 2 epochs, more than 1: a run can only be"):
            run(tmp_path, epochs=1)
        assert (tmp_path / "last.ckpt").read_bytes() == before

    def test_a_cosine_that_has_ended_cannot(self, tmp_path: Path) -> None:
        run(tmp_path, schedule="cosine")
        with pytest.raises(RunError, match=r"along a cosine: .*--init-from"):
            run(tmp_path, epochs=2, schedule="cosine")


class TestPlaces:
    def test_images_may_move(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        photos(Path("photos"))
        launch = Launch(out=Path("run"), verbose=False, max_steps=1)
        train(on(Path("photos"), epochs=2), launch)
        config = on((tmp_path / "photos").rename(tmp_path / "elsewhere"), epochs=2)
        train(config, Launch(out=Path("run"), verbose=False))
        content = RunFolder("run").read_config()
        assert content["run"]["dataset"] == str(tmp_path / "elsewhere")
        assert content["run"]["case"] == "photos-vgg8"
        photos(Path("photos"))
        train(on(Path("photos"), epochs=2), Launch(out=Path("whole"), verbose=False))
        assert_same(weights(Path("run")), weights(Path("whole")))
        assert len(evaluate("run")) == 3
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(evaluate("~/run")) == 3
        with pytest.raises(RunError, match="passes must be positive, got 0"):
            evaluate("run", passes=0)

    def test_other_images_are_another_run(self, tmp_path: Path) -> None:
        train(on(photos(tmp_path / "a")), Launch(out=tmp_path / "run", verbose=False))
        (tmp_path / "a/train/cat/0.png").write_bytes((tmp_path / "a/train/cat/1.png").read_bytes())
        config = on(tmp_path / "a", epochs=2)
        with pytest.raises(RunError, match=r"the training images have changed, or their order"):
            train(config, Launch(out=tmp_path / "run", verbose=False))

    def test_the_name_of_a_run_does_not_tell_where_its_images_are(self) -> None:
        assert on(Path("a/photos")).name == on(Path("/b/photos")).name
        assert on(Path("photos")).name != on(Path("photos"), lr=0.02).name

    def test_a_folder_without_a_split_is_recorded(self, tmp_path: Path) -> None:
        root = photos(tmp_path / "photos") / "train"
        folder = train(on(root), Launch(out=tmp_path / "run", verbose=False))
        assert "seed 0" in folder.read_config()["split"]
        assert folder.read_config()["test_images"] == 2

    def test_test_images_of_another_size_are_refused_before_training(self, tmp_path: Path) -> None:
        config = on(photos(tmp_path / "photos", test_size=16))
        with pytest.raises(
            RunError, match=r"are 8x8 pixels in size, the test images 16x16: .*--im"
        ):
            train(config, Launch(out=tmp_path / "run", verbose=False))
        assert not (tmp_path / "run" / "last.ckpt").exists()
        config = on(tmp_path / "photos", image_size=8)
        train(config, Launch(out=tmp_path / "run", verbose=False))

    def test_a_single_class_is_refused_before_training(self, tmp_path: Path) -> None:
        root = photos(tmp_path / "photos")
        for split in ("train", "val"):
            for file in (root / split / "dog").iterdir():
                file.unlink()
            (root / split / "dog").rmdir()
        with pytest.raises(RunError, match="only one class, 'cat'"):
            train(on(root), Launch(out=tmp_path / "run", verbose=False))


class TestInitFrom:
    def test_of_the_same_classes_all_weights_are_taken(self, tmp_path: Path) -> None:
        run(tmp_path / "first")
        folder = run(tmp_path / "second", init_from=tmp_path / "first", lr=1e-30)
        assert_same(weights(tmp_path / "first", "best.ckpt"), weights(folder.path))
        assert folder.read_config()["run"]["init_from"]
        assert small().name != RunConfig.from_dict(folder.read_config()["run"]).name

    @pytest.mark.parametrize("key", [None, "model", "state_dict"])
    def test_files(self, tmp_path: Path, key: str | None) -> None:
        tensors = weights(run(tmp_path / "first").path)
        torch.save(tensors if key is None else {key: tensors}, tmp_path / "weights.pt")
        run(tmp_path / "second", init_from=tmp_path / "weights.pt", lr=1e-30)
        assert_same(tensors, weights(tmp_path / "second"))

    def test_another_number_of_classes(self, tmp_path: Path) -> None:
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

    def test_weights_of_another_network(self, tmp_path: Path) -> None:
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

    def test_damaged_weights(self, tmp_path: Path) -> None:
        file = run(tmp_path / "first").path / "best.ckpt"
        with ZipFile(file) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        content = bytearray(file.read_bytes())
        content[largest.header_offset + 512] ^= 1
        file.write_bytes(content)
        assert torch.load(file, weights_only=True)  # PyTorch alone does not see it
        with pytest.raises(RunError, match=r"best\.ckpt holds no weights that can be read safely"):
            read_weights(tmp_path / "first")

    def test_a_run_that_has_begun_resumes_without_them(self, tmp_path: Path) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        run(first)
        options = [*command(second, "kernel")[3:], f"--init-from={first}"]
        main([*options, "--max-steps=1"])
        (first / "best.ckpt").unlink()
        main(options)
        assert len(RunFolder(second).read_metrics()) == 2
        with pytest.raises(SystemExit, match="cannot read weights from"):
            main([*command(tmp_path / "third", "kernel")[3:], f"--init-from={first}"])

    def test_sparse_weights(self, tmp_path: Path) -> None:
        torch.save({"linear.weight": torch.eye(3).to_sparse()}, tmp_path / "weights.pt")
        with pytest.raises(RunError, match=r"linear.weight in .* is torch.sparse.FloatTensor"):
            read_weights(tmp_path / "weights.pt")

    def test_weights_of_a_run_without_the_shape_of_its_images(self, tmp_path: Path) -> None:
        folder = run(tmp_path / "first", norm="batch")
        content = folder.read_config()
        del content["image_shape"]
        folder.write_config(content)
        with pytest.raises(RunError, match=r"'\{\"width\": 0.125\}'$"):
            run(tmp_path / "second", init_from=tmp_path / "first")

    def test_a_stopped_run_resumes_without_taking_them_again(self, tmp_path: Path) -> None:
        run(tmp_path / "first")
        run(tmp_path / "whole", epochs=2, init_from=tmp_path / "first")
        run(tmp_path / "stopped", epochs=1, init_from=tmp_path / "first")
        run(tmp_path / "stopped", epochs=2, init_from=tmp_path / "first")
        assert_same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))

    @pytest.mark.parametrize("content", [b"", b"text", None])
    def test_files_without_weights(self, tmp_path: Path, content: bytes | None) -> None:
        file = tmp_path / "weights.pt"
        if content is None:
            torch.save({"epoch": 3}, file)
        else:
            file.write_bytes(content)
        with pytest.raises(RunError, match=r"weights\.pt"):
            read_weights(file)

    def test_a_folder_without_weights(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"cannot read weights from .*best\.ckpt"):
            read_weights(tmp_path)


def test_what_is_trained_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1))
    expected = (
        "training vgg8 with KernelNorm: 40 grey images of 8x8 pixels, 10 classes, batch size 8, "
        "at most 1 epoch; 40 test images"
    )
    assert expected in capsys.readouterr().out
    train(small(), Launch(out=tmp_path))
    assert f"resuming {tmp_path} after step 1 of epoch 1" in capsys.readouterr().out


class TestRecipes:
    def test_cosine_and_warm_up(self) -> None:
        config = small(epochs=10, lr=1.0, schedule="cosine", warmup_epochs=2)
        assert config.lr_at(0, 0.5) == 0.25
        assert config.lr_at(1.5, 0.5) == 1.0
        assert config.lr_at(2) == 1.0
        assert config.lr_at(6) == pytest.approx(0.5)
        assert config.lr_at(9.99) == pytest.approx(0, abs=1e-5)

    def test_steps_and_warm_up(self) -> None:
        config = small(epochs=10, lr=1.0, lr_milestones=[4], warmup_epochs=1)
        assert [config.lr_at(t) for t in (1, 3.99, 4)] == pytest.approx([1, 1, 0.1])

    def test_adamw_is_trained_and_resumed(self, tmp_path: Path) -> None:
        options = {"optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 0.5}
        run(tmp_path / "whole", **options, epochs=2)
        config = small(**options, epochs=2)
        assert config.lr == 0.001
        train(config, Launch(out=tmp_path / "stopped", verbose=False, max_steps=7))
        run(tmp_path / "stopped", **options, epochs=2)
        assert_same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw, got 'adam'"),
            ({"schedule": "linear"}, "schedule must be one of steps, cosine, got 'linear'"),
            ({"warmup_epochs": -1}, "warmup_epochs must be between 0 and 3e"),
            ({"schedule": "cosine", "warmup_epochs": 1}, "warmup_epochs must be fewer than epochs"),
            ({"seed": -1}, "seed must be between 0 and 2"),
            ({"seed": 1 << 70}, "seed must be between 0 and 2"),
        ],
    )
    def test_ranges(self, choice: dict[str, Any], message: str) -> None:
        with pytest.raises(RunError, match=message):
            small(**choice)


def test_the_first_steps_of_a_process_are_left_out_of_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernelnorm.experiments import trainer

    calls: list[None] = []

    def clock() -> float:  # it is looked at twice a step
        calls.append(None)
        return 0.25 * len(calls) + 100 * (len(calls) > 1)

    monkeypatch.setattr(trainer.time, "perf_counter", clock)
    (metrics,) = run(tmp_path).read_metrics()
    assert metrics["images_per_second"] == pytest.approx(16)
    assert metrics["seconds"] == pytest.approx(40 / 16)
    assert metrics["startup_seconds"] > 90


def test_evaluation_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    folder = run(tmp_path / "run").path
    torch.manual_seed(1)
    before = torch.get_rng_state()
    evaluate(folder, passes=2, accelerator="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == 1
