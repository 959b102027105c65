"""Runs are loaded, extended, moved, and started from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import kernelnorm as kn
from kernelnorm.experiments.data import load_images
from kernelnorm.experiments.errors import DataError, RunError
from kernelnorm.experiments.evaluation import evaluate, predict
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.trainer import train
from tests.small_runs import assert_same, on, photos, run, small, weights


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


def test_what_is_trained_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(epochs=1, subset=40)
    train(config, Launch(out=tmp_path, max_steps=1))
    expected = (
        "training vgg8 with KernelNorm: 40 grey images of 8x8 pixels, 10 classes, batch size 8, "
        "at most 1 epoch; 40 test images"
    )
    assert expected in capsys.readouterr().out
    train(config, Launch(out=tmp_path))
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
            ({"warmup_epochs": -1}, "--warmup-epochs must be between 0 and 3e"),
            (
                {"schedule": "cosine", "warmup_epochs": 1},
                "--warmup-epochs must be less than",
            ),
            ({"seed": -1}, "seed must be between 0 and 2"),
            ({"seed": 1 << 32}, "seed must be between 0 and 2"),
        ],
    )
    def test_ranges(self, choice: dict[str, Any], message: str) -> None:
        with pytest.raises(RunError, match=message):
            small(**{"epochs": 1, **choice})


def test_the_first_steps_of_a_process_are_left_out_of_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernelnorm.experiments import trainer

    calls: list[None] = []

    def clock() -> float:  # it is looked at twice a step
        calls.append(None)
        return 0.25 * len(calls) + 100 * (len(calls) > 1)

    monkeypatch.setattr(trainer.time, "perf_counter", clock)
    (metrics,) = run(tmp_path, subset=40).read_metrics()
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
