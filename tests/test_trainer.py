"""A run goes on where it was stopped, and stops where it should."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernelnorm.experiments import runs, trainer
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.recipes import RunConfig, configure, recipe_for
from kernelnorm.experiments.runs import DivergedError, RunError, RunFolder, final_accuracy
from kernelnorm.experiments.trainer import train

SMALL: dict[str, Any] = {"batch_size": 8, "epochs": 2, "subset": 60, "image_size": 8}


def small(norm: str = "kernel", **choices: Any) -> RunConfig:
    return configure(recipe_for("digits-vgg8"), **{"norm": norm, **SMALL, **choices})


def command(out: Path, norm: str) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    every_step = ["--checkpoint-minutes=0", "--accelerator=cpu", f"--norm={norm}", f"--out={out}"]
    return [sys.executable, "-m", "kernelnorm", "train", "digits-vgg8", *options, *every_step]


def weights(out: Path) -> dict[str, torch.Tensor]:
    state = RunFolder(out).load("last.ckpt")
    assert state is not None
    weights_: dict[str, torch.Tensor] = state["model"]
    return weights_


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def without_times(out: Path) -> list[dict[str, float]]:
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in m.items() if k not in timed} for m in RunFolder(out).read_metrics()]


def test_run_folder_holds_what_the_documentation_says(tmp_path: Path) -> None:
    config = small()
    folder = train(config, Launch(out=tmp_path, tensorboard=True, verbose=False))
    content = folder.read_config()
    assert RunConfig.from_record(content["run"]) == config
    assert content["classes"] == [str(digit) for digit in range(10)]
    assert content["image_shape"] == [1, 8, 8]
    assert content["environment"]["torch"] == torch.__version__
    history = folder.read_metrics()
    assert [metrics["epoch"] for metrics in history] == [1, 2]
    assert set(history[0]) == {
        *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("lr", "seconds", "images_per_second"),
    }
    assert list((tmp_path / "tensorboard").iterdir())
    best = folder.load("best.ckpt")
    assert best is not None
    accuracies = [metrics["test_accuracy"] for metrics in history]
    assert accuracies[best["epoch"] - 1] == max(accuracies)
    assert not list(tmp_path.glob("*.part"))


def test_training_learns(tmp_path: Path) -> None:
    config = configure(recipe_for(), norm="kernel", batch_size=32, epochs=3, subset=500, lr=0.02)
    history = train(config, Launch(out=tmp_path, verbose=False)).read_metrics()
    assert history[-1]["train_loss"] < 0.75 * history[0]["train_loss"]
    assert history[-1]["test_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("norm", "sign"),
    [("kernel", "last.ckpt"), ("batch", "best.ckpt")],
    ids=["within the first epoch", "as the first epoch ends"],
)
def test_killed_run_ends_with_the_same_weights(norm: str, sign: str, tmp_path: Path) -> None:
    config = small(norm, epochs=10)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config, Launch(out=whole, verbose=False))
    process = subprocess.Popen(
        [*command(killed, norm), "--epochs=10"],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (killed / sign).exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train(config, Launch(out=killed, verbose=False))
    assert_same_weights(whole, killed)
    assert without_times(whole) == without_times(killed)


@pytest.mark.parametrize("stops", [[3], [8], [2, 5, 11]])
def test_run_paused_in_and_between_epochs_ends_with_the_same_weights(
    stops: list[int], tmp_path: Path
) -> None:
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    config = replace(small(), augment=True, standardise=True)  # 8 steps an epoch
    train(config, Launch(out=whole, verbose=False))
    for stop in stops:
        train(config, Launch(out=paused, max_steps=stop, verbose=False))
        assert len(RunFolder(paused).read_metrics()) == stop // 8
    train(config, Launch(out=paused, verbose=False))
    assert_same_weights(whole, paused)
    assert without_times(whole) == without_times(paused)


def test_metrics_are_had_back_from_the_checkpoint(tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, max_steps=12, verbose=False))
    before = folder.read_metrics()
    (tmp_path / "metrics.jsonl").unlink()
    train(small(), Launch(out=tmp_path, verbose=False))
    assert folder.read_metrics()[:-1] == before


def test_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(), Launch(out=tmp_path, verbose=False))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    train(small(), Launch(out=tmp_path))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    assert "is finished, after 2 epochs" in capsys.readouterr().out


def test_another_configuration_is_an_error(tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    with pytest.raises(RunError, match=r"norm is 'kernel' there and 'batch' here; lr is .* --out"):
        train(small("batch"), Launch(out=tmp_path))


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_damaged_checkpoint_is_named(content: bytes | None, tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    file = tmp_path / "last.ckpt"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(RunError, match=r"last\.ckpt is damaged .* delete it to start"):
        train(small(), Launch(out=tmp_path))


def test_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    state = folder.load("last.ckpt")
    assert state is not None
    folder.save("last.ckpt", {**state, "model": {}})
    with pytest.raises(RunError, match=r"last\.ckpt does not fit this run"):
        train(small(), Launch(out=tmp_path))
    folder.save("last.ckpt", {**state, "rng": state["rng"] * 2})
    with pytest.raises(RunError, match="begun with 2 processes and can only go on with as many"):
        train(small(), Launch(out=tmp_path))


def test_checkpoint_without_config_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(RunError, match=r"has a checkpoint but no config\.yaml"):
        train(small(), Launch(out=tmp_path))


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

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(
        RunError, match=r"cannot write .*\.ckpt: No space left on device\. .*intact"
    ):
        train(small(), Launch(out=tmp_path, verbose=False))
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*config\.yaml: (Not a dir|File exists)"):
        train(small(), Launch(out=tmp_path / "file"))


def test_missing_accelerator_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot use 1 x accelerator 'tpu'"):
        train(small(), Launch(out=tmp_path, accelerator="tpu"))


def test_a_single_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="1 training images are too few for a batch"):
        train(small(subset=1), Launch(out=tmp_path))


def test_images_too_small_for_the_network_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"vgg8 with norm instance cannot train on .*--image-size"):
        train(small("instance"), Launch(out=tmp_path))


def test_unknown_model_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"vgg8 cannot be made: .*'depth'.* See --model-options"):
        train(small(model_options={"depth": 3}), Launch(out=tmp_path))


def test_final_accuracy_is_the_mean_of_the_last_five_epochs() -> None:
    history = [{"test_accuracy": accuracy} for accuracy in (0.99, 0.1, 0.2, 0.3, 0.4, 0.5)]
    assert final_accuracy(history) == pytest.approx(0.3)


def test_two_processes_train_together(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--module"]
    run = [*torchrun, *command(tmp_path, "batch")[2:], "--max-steps=11"]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(RunFolder(tmp_path).read_metrics()) == 1
    with pytest.raises(RunError, match="begun with 2 processes and can only go on with as many"):
        train(small("batch"), Launch(out=tmp_path))
