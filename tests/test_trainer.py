"""A run goes on where it was stopped, and stops where it should."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch._dynamo.utils import counters

from kernelnorm.experiments import files, launch, trainer
from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.data import Images
from kernelnorm.experiments.errors import DivergedError, RunError
from kernelnorm.experiments.launch import Launch, check_shares, share
from kernelnorm.experiments.networks import build_network
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.runs import RunFolder, final_accuracy
from kernelnorm.experiments.trainer import train
from tests.processes import wait_for

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
    timed = ("seconds", "images_per_second", "startup_seconds")
    return [{k: v for k, v in m.items() if k not in timed} for m in RunFolder(out).read_metrics()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own parts
def test_a_compiled_network_is_trained_all_the_same(tmp_path: Path) -> None:
    graphs = counters["stats"]["unique_graphs"]
    for compile in (False, True):
        assert counters["stats"]["unique_graphs"] == graphs
        out = tmp_path / str(compile)
        launch = Launch(out=out, accelerator="cpu", compile=compile, verbose=False)
        train(small("layer", epochs=1, subset=64), launch)
    assert counters["stats"]["unique_graphs"] > graphs
    expected = weights(tmp_path / "False")
    torch.testing.assert_close(weights(tmp_path / "True"), expected, rtol=1e-4, atol=1e-4)


def test_adaptive_gradient_clipping_bounds_the_first_step(tmp_path: Path) -> None:
    def first_step(agc: float) -> list[float]:
        """How far the filters of each convolution move, relative to them, at most."""
        launch = Launch(out=tmp_path / str(agc), max_steps=1, accelerator="cpu", verbose=False)
        config = small("nf", lr=1.0, agc=agc)
        torch.manual_seed(config.seed)
        before = build_network(config, num_classes=10, in_channels=1).state_dict()
        after = weights(train(config, launch).path)
        filters = [name for name, x in before.items() if x.dim() == 4 and x.shape[1] > 1]
        norms = [
            [x[name].flatten(1).norm(dim=1) for name in filters]
            for x in ({name: after[name] - before[name] for name in filters}, before)
        ]
        return [float((moved / whole).max()) for moved, whole in zip(*norms, strict=True)]

    assert max(first_step(1e-3)) <= 1.001e-3
    assert max(first_step(1e3)) > 2e-3


def test_run_folder_holds_what_the_documentation_says(tmp_path: Path) -> None:
    config = small()
    folder = train(config, Launch(out=tmp_path, tensorboard=True, verbose=False))
    content = folder.read_config()
    assert RunConfig.from_record(content["run"]) == config
    assert content["classes"] == [str(digit) for digit in range(10)]
    assert content["image_shape"] == [1, 8, 8]
    assert (content["train_images"], content["test_images"]) == (60, 60)
    assert content["environment"]["torch"] == torch.__version__
    history = folder.read_metrics()
    assert [metrics["epoch"] for metrics in history] == [1, 2]
    assert set(history[0]) == {
        *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("lr", "seconds", "images_per_second", "startup_seconds"),
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
    [
        pytest.param("kernel", "last.ckpt", id="within the first epoch"),
        pytest.param("batch", "best.ckpt", id="as the first epoch ends", marks=pytest.mark.slow),
    ],
)
def test_killed_run_ends_with_the_same_weights(
    norm: str, sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(norm, epochs=20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [*command(killed, norm), "--epochs=20"],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for((killed / sign).exists)
        process.send_signal(signal.SIGSTOP)  # or it would be over before it is killed
        with pytest.raises(RunError, match=f"another process trains in {killed}"):
            train(config, Launch(out=killed))
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    train(config, Launch(out=whole, verbose=False))
    capsys.readouterr()
    train(config, Launch(out=killed))
    # Every step saved a checkpoint. Between two epochs the message names no step.
    message = re.search(r"resuming .* after epoch (\d+)(?:, step (\d+))?", capsys.readouterr().out)
    assert message is not None
    assert 8 * int(message[1]) + int(message[2] or 0) > 0
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


@pytest.mark.parametrize("lines", [0, 1])
def test_finished_run_gets_its_lost_metrics_back(lines: int, tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, verbose=False))
    before = folder.read_metrics()
    checkpoint = (tmp_path / "last.ckpt").read_bytes()
    if lines:
        folder.write_metrics(before[:lines])
    else:
        (tmp_path / "metrics.jsonl").unlink()
    train(small(), Launch(out=tmp_path, verbose=False))
    assert folder.read_metrics() == before
    assert (tmp_path / "last.ckpt").read_bytes() == checkpoint


def test_finished_run_without_its_checkpoint_begins_anew(tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, verbose=False))
    before, final = without_times(tmp_path), weights(tmp_path)
    (tmp_path / "last.ckpt").unlink()
    train(small(), Launch(out=tmp_path, max_steps=3, verbose=False))
    assert folder.read_metrics() == []
    train(small(), Launch(out=tmp_path, verbose=False))
    assert without_times(tmp_path) == before
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(tmp_path).items())


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


def test_a_folder_older_than_a_field_is_the_same_run(tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    content = folder.read_config()
    del content["run"]["precision"]
    folder.write_config(content)
    train(small(), Launch(out=tmp_path, max_steps=2, verbose=False))
    with pytest.raises(RunError, match="precision is '32-true' there and 'bf16-mixed' here"):
        train(small(precision="bf16-mixed"), Launch(out=tmp_path))


@pytest.mark.parametrize("content", ["norm: kernel\n", "run:\n"])
def test_config_of_no_run_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(RunError, match="has no section 'run'"):
        train(small(), Launch(out=tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images.subset(59), "train_images was 60 and is 59; test_images was 60"),
        (lambda images: replace(images, classes=("a", "b")), r"classes was \['0', .*\['a', 'b'\]"),
        (
            lambda images: replace(images, pixels=images.pixels[..., :4]),
            r"image_shape was \[1, 8, 8\] and is \[1, 8, 4\]",
        ),
    ],
    ids=["fewer images", "other classes", "another shape"],
)
def test_changed_data_is_an_error(
    change: Callable[[Images], Images],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    load = trainer.load_split
    monkeypatch.setattr(trainer, "load_split", lambda *a: change(load(*a)))
    with pytest.raises(RunError, match=rf"the data of .* has changed: {message}"):
        train(small(), Launch(out=tmp_path))


def test_another_process_in_the_folder_is_an_error(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).lock(),
        pytest.raises(RunError, match=f"another process trains in {tmp_path}"),
    ):
        train(small(), Launch(out=tmp_path))
    (tmp_path / ".last.ckpt.0123.part").write_bytes(b"of a process that was killed")
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    assert not list(tmp_path.glob("*.part"))


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


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (8, r"weight is not finite at epoch 1, step 8 of 8: .*\. Nothing was saved"),
        (
            11,
            r"weight is not finite at epoch 2, step 3 of 8: .* last\.ckpt, after epoch 1, step 2,",
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


def fabric_of(world_size: int, *, rank: int = 0, device: str = "cpu") -> Fabric:
    fields = {"world_size": world_size, "global_rank": rank, "device": torch.device(device)}
    return cast(Fabric, SimpleNamespace(**fields))


def test_batches_that_processes_cannot_share_are_an_error() -> None:
    with pytest.raises(RunError, match="8 images cannot be shared out evenly over 3 processes"):
        check_shares(fabric_of(3), "layer", 8)
    with pytest.raises(RunError, match="BatchNorm cannot be trained in several processes without"):
        check_shares(fabric_of(2), "batch", 8)
    with pytest.raises(RunError, match="BatchRenorm cannot be trained in several processes:"):
        check_shares(fabric_of(2, device="cuda"), "batch_renorm", 8)
    check_shares(fabric_of(2, device="cuda"), "batch", 8)
    check_shares(fabric_of(1), "batch", 8)


def test_batch_norm_of_several_processes_sees_the_whole_batch() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert share(fabric_of(1), network, 0) is network
    shared = share(fabric_of(2), network, 0)
    assert isinstance(cast(nn.Sequential, shared)[1], nn.SyncBatchNorm)
    assert shared.state_dict().keys() == network.state_dict().keys()


def test_every_process_of_every_seed_draws_its_own() -> None:
    def draw(seed: int, rank: int) -> float:
        torch.manual_seed(seed)
        share(fabric_of(4, rank=rank), nn.Identity(), seed)
        return torch.rand(()).item()

    assert len({draw(seed, rank) for seed in range(3) for rank in range(4)}) == 12
    assert draw(1, 0) == torch.rand((), generator=torch.Generator().manual_seed(1)).item()


def test_unknown_model_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot build vgg8: .*'depth'.* See --model-options"):
        train(small(model_options={"depth": 3}), Launch(out=tmp_path))


def test_final_accuracy_is_the_mean_of_the_last_five_epochs() -> None:
    history = [{"test_accuracy": accuracy} for accuracy in (0.99, 0.1, 0.2, 0.3, 0.4, 0.5)]
    assert final_accuracy(history) == pytest.approx(0.3)


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on(tmp_path: Path) -> None:
    options = ["--standalone", "--nproc-per-node=2", "--module", "tests.two_processes"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    whole, one = tmp_path / "whole", tmp_path / "one"
    assert_same_weights(whole, tmp_path / "paused")
    for rank in (0, 1):
        message = (tmp_path / f"error{rank}").read_text()
        assert "it must be on a file system that all of them share" in message

    config = small("layer", lr=0.02)
    train(config, Launch(out=one, max_steps=12, verbose=False))
    torch.testing.assert_close(weights(whole), weights(one), rtol=1e-3, atol=1e-5)
    assert without_times(whole) == [pytest.approx(m, rel=1e-4) for m in without_times(one)]
    with pytest.raises(RunError, match="begun with 2 processes and can only go on with as many"):
        train(config, Launch(out=whole))
