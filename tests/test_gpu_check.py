"""The check on a GPU: what it runs, when it stops, and what its page says. The CI runs it dry."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
PROGRAM = "import sys; print('begun', flush=True); "


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    monkeypatch.setattr(gpu_check, "GRACE", 1)
    return gpu_check


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    (tmp_path / "steps.json").write_text("{}\n")
    return argparse.Namespace(
        dry=False, device="cuda", folder=tmp_path, runs=tmp_path / "runs", data=tmp_path / "data",
        seconds=60, goes_on=False, title="A GPU",
    )  # fmt: skip


def page(folder: Path) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("program", "seconds", "status"),
    [
        ("", 60, "ok"),
        ("sys.exit(1)", 60, "failed"),
        ("import time; time.sleep(600)", 0.5, "out of time"),
        (
            "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)",
            2,
            "out of time",
        ),
    ],
)
def test_a_step_ends_in_time(
    check: ModuleType, tmp_path: Path, program: str, seconds: float, status: str
):
    step = check.Step("step", [sys.executable, "-c", PROGRAM + program])
    assert check.run(step, seconds, tmp_path, dict(os.environ)) == status
    if status != "out of time":
        assert "begun" in (tmp_path / "step.txt").read_text()


def test_ended_steps_are_left_out_on_request(
    check: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
):
    steps = [check.Step("bad", ["false"]), check.Step("good", ["true"])]
    monkeypatch.setitem(check.PIECES, "bench", lambda _: steps)
    began: list[str] = []
    run = check.run
    monkeypatch.setattr(check, "run", lambda step, *a: began.append(step.name) or run(step, *a))
    assert check.run_piece("bench", options, dict(os.environ)) == ["bad"]
    options.goes_on = True
    assert check.run_piece("bench", options, dict(os.environ)) == ["bad"]
    assert began == ["bad", "good", "bad"]
    assert "| bad | failed |" in page(options.folder)


def test_steps_beyond_the_time_limit_are_not_begun(
    check: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(check.PIECES, "bench", lambda _: [check.Step("late", ["true"])])
    options.seconds = 1e-9
    assert check.run_piece("bench", options, dict(os.environ)) == []
    assert "| late | not begun |" in page(options.folder)


def test_the_suite_has_the_layers_tests(check: ModuleType, options: argparse.Namespace):
    (step,) = check.suite(options)
    files = {Path(word).name for word in step.command if word.startswith("tests/")}
    assert {"test_triton_kernels.py", "test_precision.py", "test_kernels_oracle.py"} <= files
    assert not files & {"test_trainer.py", "test_cli.py", "test_bench.py", "test_fuzz.py"}


def test_the_bench_covers_all_cases_and_begins_with_eager_steps(
    check: ModuleType, options: argparse.Namespace
):
    commands = [step.command for step in check.bench(options)]
    value = lambda command, name: command[command.index(name) + 1]  # noqa: E731
    found = {
        (value(c, "--networks"), value(c, "--modes"), size)
        for c in commands
        for size in value(c, "--batch-sizes").split(",")
    }
    assert len(found) == 27
    assert [value(c, "--modes") for c in commands[:3]] == ["eager"] * 3


def test_the_page_lists_failed_tests(check: ModuleType, options: argparse.Namespace):
    (options.folder / "suite.txt").write_text(
        "tests/test_a.py::test_one[x y] PASSED             [ 10%]\n"
        "tests/test_a.py::test_two FAILED                  [ 20%]\n"
        "[gw1] [ 30%] ERROR tests/test_b.py::test_three[1, 2] \n"
        "[gw0] [ 40%] SKIPPED tests/test_b.py::test_four \n"
        "FAILED tests/test_a.py::test_two - AssertionError\n"
    )
    check.write_page(options.folder, "A GPU")
    text = page(options.folder)
    assert "1 passed, 1 skipped, 2 failed." in text
    assert "- `tests/test_a.py::test_two`\n- `tests/test_b.py::test_three[1, 2]`" in text


def test_the_page_has_times_memory_and_accuracies(check: ModuleType, options: argparse.Namespace):
    variants = [
        {"norm": "kernel", "seconds": [0.002, 0.004], "peak_bytes": 5_000_000, "failure": ""},
        {"norm": "batch", "seconds": [0.002, 0.002], "peak_bytes": None, "failure": ""},
    ]
    summary = {"kernel": {"to_batch": [1.0, 1.5, 2.0], "to_none": None}}
    result = {"network": "vgg8", "batch_size": 2, "dtype": "float32", "mode": "eager"}
    failed = [{**variants[0], "seconds": [], "failure": "failed: MemoryError"}, variants[1]]
    results = [
        {**result, "variants": variants, "summary": summary},
        {**result, "variants": failed, "summary": {}},
    ]
    (options.folder / "bench-vgg8").mkdir()
    (options.folder / "bench-vgg8" / "bench.json").write_text(json.dumps({"results": results}))
    run = options.runs / "kernel-b256"
    run.mkdir(parents=True)
    epochs = [
        {"test_accuracy": accuracy, "train_loss": 0.5, "seconds": 3.0}
        for accuracy in (0.1, 0.7, 0.7, 0.7, 0.7, 0.7)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(epoch)}\n" for epoch in epochs))
    (run / "config.yaml").write_text("run: {}\n")
    check.keep_metrics(options.runs, options.folder)
    check.write_page(options.folder, "A GPU")
    text = page(options.folder)
    assert "| vgg8 | 2 | float32 | eager | 3.00 | 1.50 |  | 5 |  |" in text
    assert "| vgg8 | 2 | float32 | eager | failed: MemoryError |" in text
    assert "| kernel-b256 | 6 | 0.5000 | 70.00% | 3.0 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests"], "unknown piece 'tests': choose from suite, primitives, bench, train"),
        pytest.param(
            ["suite"],
            "PyTorch finds no CUDA GPU here; --dry runs toy sizes on the CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_arguments_are_refused(
    check: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    with pytest.raises(SystemExit):
        check.main()
    assert message in capsys.readouterr().err
