"""Runs that cannot begin, that diverge, or that cannot write."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernelnorm.experiments import files, launch, trainer
from kernelnorm.experiments.errors import DivergedError, RunError
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.trainer import train
from tests.small_runs import small, weights


class _FailsAt(nn.Module):
    """A network whose output is not a number from some step on."""

    def __init__(self, network: nn.Module, step: int) -> None:
        super().__init__()
        self.network, self.calls, self.step = network, 0, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        logits: torch.Tensor = self.network(x)
        return logits * math.nan if self.training and self.calls >= self.step else logits


@pytest.mark.parametrize("look_every", [1, 5])
def test_first_step_with_nan_is_reported_and_nothing_saved_after_it(
    look_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = trainer.build_network
    monkeypatch.setattr(trainer, "build_network", lambda *a, **k: _FailsAt(build(*a, **k), 11))
    training = trainer._Training(
        small(precision="bf16-mixed"), Launch(checkpoint_minutes=0), RunFolder(tmp_path)
    )
    training.look_every = look_every
    with pytest.raises(
        DivergedError,
        match=r"loss is nan at epoch 2, step 3 of 8: .*--lr below 0.0025 or --precision 32-true",
    ):
        training.run()
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (8, r"weight is not finite at epoch 1, step 8 of 8: .*\. Nothing was saved"),
        (
            11,
            r"weight is not finite at epoch 2, step 3 of 8: .*last\.ckpt, after step 2 of epoch 2,",
        ),
    ],
)
def test_weights_that_a_step_makes_nan_are_not_saved(
    step: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoils(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.calls += 1
            if self.calls == step:
                self.param_groups[0]["params"][0].data[0] = math.nan

    monkeypatch.setattr(torch.optim, "SGD", Spoils)
    minutes = 10.0 if step == 8 else 0.0
    with pytest.raises(DivergedError, match=message):
        train(small(), Launch(out=tmp_path, checkpoint_minutes=minutes, verbose=False))
    if step == 8:
        assert not list(tmp_path.glob("*.ckpt"))
    else:
        assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_test_loss_that_is_not_finite_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "measure", lambda *_: (math.inf, 0.1))
    with pytest.raises(DivergedError, match=r"the test loss is inf at epoch 1, step 8 of 8: "):
        train(small(), Launch(out=tmp_path, verbose=False))
    assert not list(tmp_path.glob("*.ckpt"))


def test_diverging_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"training has diverged\. Try an --lr below 1e\+08"):
        train(small("none", lr=1e8), Launch(out=tmp_path))


def test_full_disk_is_an_error_and_the_last_checkpoint_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small(), Launch(out=tmp_path, max_steps=3, verbose=False))
    before = (tmp_path / "last.ckpt").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        RunError, match=r"cannot write .*\.ckpt: No space left on device\. .*intact"
    ):
        train(small(), Launch(out=tmp_path, verbose=False))
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*lock: (Not a dir|File exists)"):
        train(small(), Launch(out=tmp_path / "file"))


def test_missing_accelerator_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot use 1 x accelerator 'tpu'"):
        train(small(), Launch(out=tmp_path, accelerator="tpu"))


def test_a_subset_without_one_of_the_classes_is_an_error(tmp_path: Path) -> None:
    message = "none of the 7 training images is of class '7': there are 10 classes"
    with pytest.raises(RunError, match=message):
        train(small(subset=7), Launch(out=tmp_path))
    assert not (tmp_path / "last.ckpt").exists()


def test_images_too_small_for_the_network_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"vgg8 with norm instance cannot train on .*--image-size"):
        train(small("instance"), Launch(out=tmp_path))


def test_images_smaller_than_the_network_can_halve_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot train on .*too small.*--image-size"):
        train(small(image_size=4), Launch(out=tmp_path))


@pytest.mark.parametrize("max_steps", [0, -3])
def test_max_steps_that_are_not_positive_are_an_error(max_steps: int) -> None:
    with pytest.raises(RunError, match=f"max_steps must be positive, got {max_steps}"):
        Launch(max_steps=max_steps)


def test_tensorboard_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda _: None)
    with pytest.raises(RunError, match=r"--tensorboard needs: pip install 'kernelnorm\[tensor"):
        Launch(tensorboard=True)


def test_unknown_model_option_is_an_error(tmp_path: Path) -> None:
    expected = (
        "cannot build vgg8: unknown option 'depth' in --model-options, choose from: width, rules"
    )
    with pytest.raises(RunError, match=f"{expected}$"):
        train(small(model_options={"depth": 3}), Launch(out=tmp_path))


@pytest.mark.filterwarnings("ignore:You passed `Fabric")
def test_float16_on_a_cpu_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--precision 16-mixed needs a GPU: choose bf16-mixed"):
        train(small(precision="16-mixed"), Launch(out=tmp_path, accelerator="cpu"))


@pytest.mark.parametrize("width", ["'x'", 1e9])
def test_a_width_that_is_no_number_or_too_large_is_an_error(width: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot build vgg8: "):
        train(small(model_options={"width": width}), Launch(out=tmp_path))


def test_an_extension_that_fails_leaves_the_configuration(tmp_path: Path) -> None:
    folder = train(small(epochs=1), Launch(out=tmp_path, verbose=False))
    before, whole = folder.read_config(), (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[:1000])
    with pytest.raises(RunError, match=r"last\.ckpt is damaged"):
        train(small(epochs=2), Launch(out=tmp_path, verbose=False))
    assert folder.read_config() == before
