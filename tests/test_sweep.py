"""A sweep trains what is missing, whatever has happened before, and says what became of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernelnorm.cli import main
from kernelnorm.cli.sweep import make_parser, make_runs
from kernelnorm.experiments import inputs
from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.data import Images, load_images
from kernelnorm.experiments.data.folder import Split
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.runs import Metrics, RunFolder
from kernelnorm.experiments.style import LABELS
from kernelnorm.experiments.sweep import (
    Grid,
    LocalPool,
    Status,
    dry_run,
    local,
    make_grid,
    sweep,
)
from kernelnorm.experiments.sweep.execute import execute
from kernelnorm.experiments.sweep.local import cores, default_jobs
from kernelnorm.experiments.sweep.reproduction import _SMALL, Scale
from kernelnorm.experiments.sweep.view import View
from tests.processes import wait_for
from tests.small_runs import on, photos

LAUNCH = Launch(accelerator="cpu")
SMALL = ["--subset=60", "--image-size=8", "--accelerator=cpu"]


def small(**options: Any) -> list[RunConfig]:
    given: dict[str, Any] = {"norms": ["batch", "layer"], "batch_sizes": [8], "epochs": 2}
    given |= {"subset": 60, "image_size": 8}
    return make_grid(recipe_for("digits-vgg8"), **{**given, **options})


class Here:
    """A pool whose runs are executed in this process, one at a time; it may lose some."""

    places = 1

    def __init__(self, lost: Sequence[RunConfig] = ()) -> None:
        self.lost, self.submitted = lost, list[RunConfig]()

    def submit(self, config: RunConfig, out: Path) -> Future[str]:
        self.submitted.append(config)
        future: Future[str] = Future()
        if config in self.lost:
            future.set_exception(BrokenProcessPool("terminated abruptly"))
        else:
            future.set_result(execute(config, LAUNCH, out))
        return future

    def close(self) -> None:
        pass


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


def test_dry_run_lists_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, missing = small()
    assert execute(done, LAUNCH, tmp_path / done.name) == ""
    folder = RunFolder(tmp_path / done.name)
    times = {"seconds": 15.0, "startup_seconds": 0.0}
    folder.write_metrics([{**metrics, **times} for metrics in folder.read_metrics()])
    options = ["--norms=batch,layer", "--batch-sizes=8", "--epochs=2", f"--out={tmp_path}"]
    main(["sweep", *SMALL, *options, "--dry-run", "--jobs=1"])
    output = capsys.readouterr().out
    assert [line.split()[4] for line in output.splitlines()[1:3]] == ["done", "missing"]
    assert f"To be trained in {tmp_path}: 1 of 2 runs, 1 at a time." in output
    assert "Time for them: 30 s, estimated from the epochs trained so far." in output
    assert not (tmp_path / missing.name).exists()


def test_dry_run_of_a_reproduction_tells_how_many_runs_to_expect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["reproduce", "digits-vgg8", "--norms=batch", "--dry-run", f"--out={tmp_path / 'none'}"])
    output = capsys.readouterr().out
    assert output.startswith("Scale small (subset 500, epochs 4): not the paper's experiment")
    assert "6 of 6 runs" in output
    assert "there will be 12 to 26 runs in the end" in output
    assert not (tmp_path / "none").exists()


def test_reproduce_tunes_repeats_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, reported = Here(), list[Path]()
    scale = Scale((32,), {"subset": 60, "epochs": 2, "image_size": 8})
    monkeypatch.setitem(_SMALL, "digits-vgg8", scale)
    monkeypatch.setattr("kernelnorm.experiments.sweep.LocalPool", lambda *_: pool)
    monkeypatch.setattr("kernelnorm.cli.reproduce.write_report", reported.append)
    options = ["--norms=batch", "--seeds=1,2", f"--out={tmp_path}"]
    main(["reproduce", "digits-vgg8", *options, "--accelerator=cpu"])
    best = next(config.lr for config in pool.submitted if config.seed == 1)
    assert [config.seed for config in pool.submitted if config.lr == best] == [0, 1, 2]
    assert len(pool.submitted) >= 5
    assert reported == [tmp_path]
    assert "Scale small (subset 60, epochs 2, " in capsys.readouterr().out.split("norm  batch")[0]
    main(["reproduce", "digits-vgg8", *options, "--accelerator=cpu"])
    assert len(reported) == 2


def test_sweep_reads_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "case: imagewoof-resnet18\nnorms: [kernel]\nbatch_sizes: [32]\nlrs: [0.01]\n"
        "seeds: [0, 1]\nrules:\n  - {dropout_p: 0.0}\n  - {}\nsubset: 1000\n"
    )
    main(["sweep", f"--config={tmp_path / 'sweep.yaml'}", "--dry-run", "--seeds=2"])
    output = capsys.readouterr().out
    assert "runs/imagewoof-resnet18: 2 of 2 runs" in output
    assert output.count("dropout_p=0 ") == 1


def test_the_recipe_of_a_case_can_be_changed() -> None:
    changes = ["--augment=false", "--weight-decay=0", "--lr-milestones="]
    for options, expected in (
        ([], (True, 1e-4, (60,))),
        (changes, (False, 0.0, ())),
        (["--lr-milestones=5,8"], (True, 1e-4, (5, 8))),
    ):
        run, *_ = make_runs(make_parser().parse_args(["imagewoof-resnet18", *options]))
        assert (run.augment, run.weight_decay, run.lr_milestones) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("batch_sizes: 8\nseeds: 1\nlrs: 1\n", [(8, 1, 1.0)]),
        ("batch_sizes: [4]\nseeds: [1, 2]\nlrs: [1e-3]\n", [(4, 1, 1e-3), (4, 2, 1e-3)]),
        ("batch_sizes: 4,2\nseeds: 0\nlrs: 0.1,\n", [(4, 0, 0.1), (2, 0, 0.1)]),
    ],
)
def test_numbers_of_a_config_file(
    given: str, expected: list[tuple[int, int, float]], tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text(f"norms: batch\n{given}")
    runs = make_runs(make_parser().parse_args([f"--config={tmp_path / 'sweep.yaml'}"]))
    assert [(run.batch_size, run.seed, run.lr) for run in runs] == expected
    assert all(isinstance(run.lr, float) for run in runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "digits-vgg8", "--scale=paper"], "digits-vgg8 is not in the paper"),
        (["reproduce", "--seeds=0"], "seed 0 is the seed of the tuning"),
    ],
)
def test_problems_exit_with_1_and_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernelnorm.experiments.sweep.cluster.find_spec", lambda _: True)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert message in str(error.value.code)
    assert "\n" not in str(error.value.code)


@pytest.mark.parametrize(
    "option", ["--lrs=high", "--batch-sizes=two", "--seeds=[one]", "--scale=huge"]
)
def test_wrong_arguments_exit_with_2(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["reproduce" if "scale" in option else "sweep", option])
    assert option.split("=")[1] in capsys.readouterr().err


def test_failed_runs_exit_with_1_and_say_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernelnorm.experiments.sweep.LocalPool", lambda *_: Here())
    options = ["--norms=instance,batch", "--batch-sizes=8", "--epochs=1", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match=r"runs that have failed: 1\. In the folder of each, "):
        main(["sweep", *SMALL, *options])


def test_the_live_table_stays_in_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    configs = small(norms=["batch", "layer"], batch_sizes=[8, 2])
    view = View("Scale small.", jobs=2)
    view.show([Status(config, "missing") for config in configs], [])
    first = capsys.readouterr().out
    assert first.startswith("Scale small.\n")
    rows = [line.split() for line in first.splitlines()]
    assert [row[:2] for row in rows if row and row[0] in LABELS.values()] == [
        [LABELS[norm], batch_size] for batch_size in ("8", "2") for norm in ("batch", "layer")
    ]
    view.show([Status(config, "running") for config in configs], [])
    assert "\x1b[5F\x1b[J" in capsys.readouterr().out  # back to the heading
    monkeypatch.setenv("LINES", "6")
    view.show([Status(config, "missing") for config in configs], [])
    assert "and 4 more" in capsys.readouterr().out
    view.close()


def test_ray_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelnorm.experiments.sweep.cluster.find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"--ray needs: pip install 'kernelnorm\[cluster\]'"):
        main(["sweep", "--ray", f"--out={tmp_path}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpus-per-run=2"], "are for a cluster: add --ray"),
        (["--ray=auto", "--jobs=2"], "with --ray give --cpus-per-run"),
        (["--ray=auto", "--dry-run"], "give --jobs instead of --ray"),
    ],
)
def test_options_that_contradict_each_other(
    options: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["sweep", *SMALL, *options, f"--out={tmp_path}"])


def test_a_case_after_ray_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelnorm.experiments.sweep.cluster.find_spec", lambda _: True)
    with pytest.raises(SystemExit, match="--ray digits-vgg8: an address is auto, local or HOST"):
        main(["sweep", "--ray", "digits-vgg8", f"--out={tmp_path}"])
