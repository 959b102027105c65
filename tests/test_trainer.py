"""What a run does and leaves behind, in one process and in two."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch._dynamo.utils import counters

from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch, check_shares, share
from kernelnorm.experiments.networks import build_network
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.runs import final_accuracy
from kernelnorm.experiments.trainer import train
from tests.small_runs import assert_same_weights, small, weights, without_times


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


def test_the_environment_says_whether_the_network_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        launch = Launch(out=out, compile=compiled, max_steps=1, verbose=False)
        assert ("compile" in train(small(), launch).read_config()["environment"]) == compiled


def test_run_folder_holds_what_the_documentation_says(tmp_path: Path) -> None:
    config = small()
    folder = train(config, Launch(out=tmp_path, tensorboard=True, verbose=False))
    content = folder.read_config()
    assert RunConfig.from_dict(content["run"]) == config
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


def test_batch_norm_of_several_processes_becomes_sync_batch_norm() -> None:
    """Which trains on GPUs only: here it has the same weights, and evaluates as before."""
    network, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.randn(4, 1, 5, 5)
    network(x)
    y, expected = network.eval()(x), copy.deepcopy(network.state_dict())
    assert share(fabric_of(1), network, 0) is network
    shared = share(fabric_of(2), network, 0)
    assert isinstance(cast(nn.Sequential, shared)[1], nn.SyncBatchNorm)
    assert_close = torch.testing.assert_close
    assert_close(shared.state_dict(), expected)
    assert_close(shared.eval()(x), y)


def test_every_process_of_every_seed_draws_its_own() -> None:
    def draw(seed: int, rank: int) -> float:
        torch.manual_seed(seed)
        share(fabric_of(4, rank=rank), nn.Identity(), seed)
        return torch.rand(()).item()

    assert len({draw(seed, rank) for seed in range(3) for rank in range(4)}) == 12
    assert draw(1, 0) == torch.rand((), generator=torch.Generator().manual_seed(1)).item()


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
    with pytest.raises(RunError, match="started with 2 processes and can resume only with 2, not"):
        train(config, Launch(out=whole))
