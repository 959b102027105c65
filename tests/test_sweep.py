"""A sweep trains what is missing, whatever has happened before, and says what became of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernelnorm.cli import main
from kernelnorm.experiments import inputs
from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.data import Images, load_images
from kernelnorm.experiments.data.folder import Split
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.runs import Metrics, RunFolder
from kernelnorm.experiments.sweep import Grid, LocalPool, Status, dry_run, local, sweep
from kernelnorm.experiments.sweep.local import cores, default_jobs
from tests.processes import wait_for
from tests.small_runs import on, photos
from tests.small_sweeps import LAUNCH, SMALL, Here, small


class Empty(Here):
    """A cluster that has no machine at first."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    @property
    def places(self) -> int:  # type: ignore[override]
        self.asked += 1
        return int(self.asked > 2)


def test_a_sweep_waits_for_machines(tmp_path: Path) -> None:
    (config,) = small(norms=["layer"], epochs=1)
    (status,) = sweep(Grid([config]), tmp_path, Empty(), Path("data"))
    assert status.state == "done"


def run(configs: Sequence[RunConfig], root: Path, pool: Here) -> list[Status]:
    return sweep(Grid(configs), root, pool, Path("data"))


def without_times(root: Path) -> dict[str, list[Metrics]]:
    timed = ("seconds", "images_per_second", "startup_seconds")
    return {
        path.name: [
            {key: value for key, value in metrics.items() if key not in timed}
            for metrics in RunFolder(path).read_metrics()
        ]
        for path in root.iterdir()
        if path.is_dir()
    }


def test_what_is_there_is_not_trained_again(tmp_path: Path) -> None:
    first, second = small(), small(seeds=[0, 1])
    pool = Here()
    assert [status.state for status in run(first, tmp_path, pool)] == ["done", "done"]
    assert [status.state for status in run(second, tmp_path, pool)] == ["done"] * 4
    assert pool.submitted == [*first, *(config for config in second if config.seed == 1)]


def test_a_diverged_run_is_a_result_and_a_failed_one_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (diverges,) = small(norms=["none"], lrs=[1e8])
    (fails,) = small(norms=["instance"])  # the last maps are of 1 x 1
    (works,) = small(norms=["batch"])
    configs, pool = [diverges, fails, works], Here()
    for _ in range(2):
        states = [status.state for status in run(configs, tmp_path, pool)]
        assert states == ["diverged", "failed", "done"]
    assert pool.submitted == [diverges, fails, works, fails]
    failure = RunFolder(tmp_path / diverges.name).read_failure()
    assert failure is not None
    assert failure["kind"] == "diverged"
    assert "training has diverged" in failure["message"]
    assert f"{fails.name}: vgg8 with norm instance cannot train on" in capsys.readouterr().out


def test_a_run_that_failed_before_it_had_data_is_whole_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config,) = small(norms=["batch"])
    with monkeypatch.context() as patch:
        patch.setattr("kernelnorm.experiments.trainer.load_split", lambda *_: 1 / 0)
        (status,) = run([config], tmp_path, Here())
    assert (status.state, status.message) == ("failed", "ZeroDivisionError: division by zero")
    assert RunFolder(tmp_path / config.name).read_config() == {"run": config.as_dict()}
    (status,) = run([config], tmp_path, Here())
    assert status.state == "done"
    assert RunFolder(tmp_path / config.name).read_config()["train_images"] == 60
    assert RunFolder(tmp_path / config.name).read_failure() is None


def test_a_damaged_folder_holds_up_its_own_run_alone(tmp_path: Path) -> None:
    configs = small()
    run(configs[:1], tmp_path, Here())
    metrics = tmp_path / configs[0].name / "metrics.jsonl"
    for damage in ('{"epoch": 1, "train_lo', '{"epoch": 1}\n', "[]\n"):
        metrics.write_text(damage)
        damaged, whole = run(configs, tmp_path, Here())
        assert (damaged.state, whole.state) == ("failed", "done")
        assert "metrics.jsonl, line 1," in damaged.message
    metrics.unlink()
    (metrics.parent / "failure.json").write_text("[]")
    assert [status.state for status in run(configs, tmp_path, Here())] == ["done", "done"]


def test_a_run_whose_process_dies_has_failed_and_the_others_go_on(tmp_path: Path) -> None:
    configs = small()
    states = [status.state for status in run(configs, tmp_path, Here(lost=configs[:1]))]
    assert states == ["failed", "done"]
    failure = RunFolder(tmp_path / configs[0].name).read_failure()
    assert failure == {"kind": "failed", "message": "its process was lost: terminated abruptly"}
    assert [status.state for status in run(configs, tmp_path, Here())] == ["done", "done"]


def test_a_run_that_another_process_trains_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = small()
    elsewhere = RunFolder(tmp_path / configs[0].name)
    lock = elsewhere.lock()
    lock.__enter__()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        lock.__exit__(None, None, None)  # it has been killed

    monkeypatch.setattr("kernelnorm.experiments.sweep.time.sleep", sleep)
    pool = Here()
    assert [status.state for status in run(configs, tmp_path, pool)] == ["done", "done"]
    assert slept
    assert pool.submitted == [configs[1], configs[0]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
def test_a_sweep_that_is_killed_ends_with_the_same_results(
    tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    options = ["--norms=batch,layer", "--batch-sizes=8", "--seeds=0,1,2", "--epochs=12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    configs = small(seeds=[0, 1, 2], epochs=12)
    command = [sys.executable, "-m", "kernelnorm", "sweep", *SMALL, *options, f"--out={killed}"]

    def lines(config: RunConfig) -> int:
        return len(RunFolder(killed / config.name).read_metrics())

    # First the process that was started, alone; then it and its workers together.
    for epochs, kill in ((14, os.kill), (38, os.killpg)):
        process = subprocess.Popen(
            [*command, "--jobs=2"], start_new_session=True, stdout=subprocess.DEVNULL
        )
        wait_for(lambda least=epochs: sum(map(lines, configs)) >= least)  # type: ignore[misc]
        kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        wait_for(lambda: not any(RunFolder(path).is_locked() for path in killed.iterdir()))
        assert any(0 < lines(config) < 12 for config in configs)
    main(["sweep", *SMALL, *options, f"--out={killed}", "--jobs=2"])
    set_threads(max(1, cores() // 2))  # as each of two jobs has
    run(configs, whole, Here())
    assert without_times(killed) == without_times(whole)


def test_a_run_compiles_with_as_many_processes_as_it_has_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setattr(local, "_run", _compile_threads)
    monkeypatch.setattr(local, "cores", lambda: 6)
    (config,) = small(norms=["batch"])
    pool = LocalPool(LAUNCH, jobs=2)
    try:
        assert pool.submit(config, tmp_path).result(timeout=60) == "3"
    finally:
        pool.close()
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ


def _compile_threads(config: RunConfig, launch: Launch, out: Path) -> str:
    import torch._inductor.config as compiler

    return str(compiler.compile_threads)


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_run_with_it(tmp_path: Path) -> None:
    (long,), (short,) = small(norms=["batch"], epochs=5000), small(norms=["layer"])
    pool = LocalPool(LAUNCH, jobs=2)
    try:
        lost = pool.submit(long, tmp_path / "long")
        (process,) = multiprocessing.active_children()
        kept = pool.submit(short, tmp_path / "short")
        wait_for((tmp_path / "long" / "metrics.jsonl").exists)
        process.kill()
        assert isinstance(lost.exception(timeout=60), BrokenProcessPool)
        assert kept.result(timeout=60) == ""
        again = pool.submit(replace(long, epochs=1), tmp_path / "again")
        assert again.result(timeout=60) == ""
        pool.submit(long, tmp_path / "long")
    finally:
        start = time.monotonic()
        pool.close()
    assert time.monotonic() - start < 5  # not until the run has ended
    assert not multiprocessing.active_children()
    assert len(RunFolder(tmp_path / "short").read_metrics()) == 2


@pytest.mark.slow
def test_what_an_unexpected_error_printed_is_in_the_runs_folder(tmp_path: Path) -> None:
    (config,) = small(norms=["batch"])
    pool = LocalPool(replace(LAUNCH, data_dir=None), jobs=1)  # type: ignore[arg-type]
    try:
        assert pool.submit(config, tmp_path / "run").result(timeout=60).startswith("TypeError: ")
    finally:
        pool.close()
    assert "Traceback" in (tmp_path / "run" / "output.txt").read_text()


def test_a_finished_run_of_other_images_is_refused(tmp_path: Path) -> None:
    one, two = (photos(tmp_path / place / "photos", label=place) for place in ("cat", "bird"))
    runs = tmp_path / "runs"
    assert [status.state for status in run([on(one)], runs, Here())] == ["done"]
    (runs / on(two).name / "last.ckpt").unlink()
    for refused in (
        lambda: run([on(two)], runs, Here()),
        lambda: dry_run(Grid([on(two)]), runs, 1, Path("data")),
    ):
        with pytest.raises(RunError, match=r"the data of .* has changed: classes was .*'cat'"):
            refused()


def test_images_of_finished_runs_are_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photos(tmp_path / "photos")
    configs = [on(images, seed=seed) for seed in (0, 1)]
    run(configs, tmp_path / "runs", Here())
    loaded = []

    def load(dataset: str, split: Split, **options: Any) -> Images:
        loaded.append(split)
        return load_images(dataset, split, **options)

    monkeypatch.setattr(inputs, "load_images", load)
    run(configs, tmp_path / "runs", Here())
    assert loaded == ["train", "test"]


def test_as_many_runs_at_a_time_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert default_jobs("cpu") == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert default_jobs("cpu") == 7


@pytest.mark.parametrize(
    ("device", "gib", "jobs"),
    [("cuda", 0.5, 1), ("cuda", 15.9, 1), ("cuda", 16, 2), ("cuda", 80, 3), ("mps", 80, 1)],
)
def test_one_run_for_each_8_gib_of_a_gpus_free_memory_at_most_one_for_each_core(
    monkeypatch: pytest.MonkeyPatch, device: str, gib: float, jobs: int
) -> None:
    fabric = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(local, "make_fabric", lambda _: fabric)
    monkeypatch.setattr(local, "cores", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(gib * 2**30), 2**40))
    assert default_jobs("auto") == jobs
