"""Private runs that are stopped, resumed, evaluated and compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("opacus")

from kernelnorm.experiments import private_steps
from kernelnorm.experiments.compare import Row, compare
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.evaluation import evaluate
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.report import report
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.trainer import train
from tests.private_runs import SMALL, known, small
from tests.processes import wait_for
from tests.small_runs import assert_same_weights, without_times


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "augmentations": 2, "augment": True}])
@known
def test_paused_run_ends_with_the_same_weights_and_epsilon(
    options: dict[str, Any], tmp_path: Path
) -> None:
    whole, paused, config = tmp_path / "whole", tmp_path / "paused", small(**options)
    train(config, Launch(out=whole, verbose=False))
    for stop in (1, 4, 6):
        train(config, Launch(out=paused, max_steps=stop, verbose=False))
        state = RunFolder(paused).load("last.ckpt")
        assert state is not None
        assert state["accountant"]["history"] == [(2.0, 16 / 60, stop)]
    train(config, Launch(out=paused, verbose=False))
    assert_same_weights(whole, paused)
    assert without_times(whole) == without_times(paused)


@pytest.mark.slow
def test_killed_run_ends_with_the_same_weights_and_epsilon(tmp_path: Path) -> None:
    """Between two checkpoints, so that the steps since the first are taken again."""
    config, whole, killed = small(epochs=12, epsilon=4.0), tmp_path / "whole", tmp_path / "killed"
    options = {**SMALL, "epochs": 12, "epsilon": 4.0, "accelerator": "cpu", "out": killed}
    options |= {"model_options": '{"width": 0.0625}'}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "kernelnorm", "train", "digits-vgg8", "--private", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for((killed / "last.ckpt").exists)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert len(RunFolder(killed).read_metrics()) < 12
    train(config, Launch(out=killed, accelerator="cpu", verbose=False))
    train(config, Launch(out=whole, accelerator="cpu", verbose=False))
    assert_same_weights(whole, killed)
    assert without_times(whole) == without_times(killed)
    assert RunFolder(killed).read_metrics()[-1]["epsilon"] <= 4.0


@known
def test_averaged_weights_are_tested_and_saved_for_use(tmp_path: Path) -> None:
    config = small("group", ema=0.9)
    folder = train(config, Launch(out=tmp_path, verbose=False))
    state, last = folder.load("last.ckpt"), folder.read_metrics()[-1]
    assert state is not None
    assert any(not torch.equal(x, state["trained"][name]) for name, x in state["model"].items())
    (score,) = evaluate(tmp_path, accelerator="cpu")
    assert (score.loss, score.accuracy) == pytest.approx((last["test_loss"], last["test_accuracy"]))


@known
def test_another_account_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    monkeypatch.setattr(private_steps, "noise_multiplier", lambda *_: 3.0)
    with pytest.raises(RunError, match=r"does not fit this run .*noise multiplier and sampling"):
        train(small(), Launch(out=tmp_path, verbose=False))


@known
@pytest.mark.parametrize("steps", [3, None])
def test_a_private_run_cannot_be_extended(steps: int | None, tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=steps, verbose=False))
    with pytest.raises(RunError, match=r"private run of 2 epochs.* cannot be extended to 3.*--out"):
        train(small(epochs=3), Launch(out=tmp_path))


@known
def test_other_options_are_another_run(tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    with pytest.raises(RunError, match=r"another run: private epsilon is 8.0 there and 3.0 here\."):
        train(small(epsilon=3.0), Launch(out=tmp_path))
    with pytest.raises(RunError, match="another run: private is True there and False here; "):
        train(replace(small(), private=None), Launch(out=tmp_path))


@known
def test_a_run_resumes_after_an_option_with_a_default_value_was_added(tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    folder = RunFolder(tmp_path)
    content = folder.read_config()
    del content["run"]["private"]["secure_mode"]  # as if it had been written before this option
    folder.write_config(content)
    train(small(), Launch(out=tmp_path, verbose=False))
    assert len(folder.read_metrics()) == small().epochs


@known
def test_report_and_comparison_tell_epsilon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [small(norm) for norm in ("kernel", "group")]
    rows = compare(configs, tmp_path, Launch())
    assert all(isinstance(row, Row) and not row.failure for row in rows)
    assert "Differentially private: epsilon 8 at delta 1e-05" in capsys.readouterr().out
    assert "Differentially private: epsilon 8" in (tmp_path / "comparison.md").read_text()
    page = report(tmp_path).with_name("report.md").read_text()
    spent = rows[0].history[-1]["epsilon"]
    assert "## digits-vgg8, epsilon 8" in page
    assert f"spent: epsilon {spent:.2f}" in page
