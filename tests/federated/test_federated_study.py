"""The study's program: which runs there are, and what becomes of their results."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import study
from PIL import Image
from study import NORMS, PARTITIONS, RATES, Run, planned, score

ROUNDS, IMAGES = 2, 100


def entry(run: Run, accuracy: float, diverged: bool = False) -> dict[str, Any]:
    return {"run": asdict(run), "accuracy": [0.1, accuracy], "diverged": diverged}


def test_all_runs_are_planned_once_and_further_seeds_take_the_best_rate() -> None:
    first = [*planned({}, (8, 32), ROUNDS, IMAGES)]
    assert len(first) == len({*first}) == len(PARTITIONS) * 2 * len(NORMS) * 3
    results = {run: entry(run, run.rate) for run in first}
    worst = Run("dirichlet-0.1", 32, "none", 0.1, 0, ROUNDS, IMAGES)
    results[worst] = entry(worst, 0.9, diverged=True)
    everything = [*planned(results, (8, 32), ROUNDS, IMAGES)]
    further = [run for run in everything if run.seed]
    assert len(everything) == len({*everything}) == len(first) + 2 * 2 * len(NORMS)
    assert {run.partition for run in further} == {"dirichlet-0.1"}
    for run in further:
        rates = RATES[run.batch_size]
        assert run.rate == (rates[1] if (run.norm, run.batch_size) == ("none", 32) else rates[2])


def test_a_run_that_diverged_scores_nothing() -> None:
    run = Run("even", 8, "none", 0.1, 0, ROUNDS, IMAGES)
    assert score(entry(run, 0.5)) == pytest.approx(0.3)
    assert score(entry(run, 0.5, diverged=True)) == 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, label, i in itertools.product(("train", "test"), range(10), range(10)):
        folder = tmp_path / "data" / "cifar10" / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (25 * label, 10 * i, 0)).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_runs_are_trained_recorded_shown_and_not_repeated(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(study, "NORMS", ("kernel", "none"))
    monkeypatch.setattr(study, "PARTITIONS", {"dirichlet-0.1": {"partition": "even"}})
    monkeypatch.setattr(study, "RATES", {32: (0.01, 1e20)})
    monkeypatch.setattr(study, "SEEDS", {"dirichlet-0.1": (0, 1)})
    common = ["--out", str(tmp_path / "out"), "--rounds", "2", "--images", "100"]
    study.main(["run", "--data-dir", str(data), "--limit", "1", *common])
    study.main(["run", "--data-dir", str(data), *common])
    assert "all runs are done" in capsys.readouterr().out
    file = tmp_path / "out" / "results.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    runs = [(e["run"]["norm"], e["run"]["rate"], e["run"]["seed"]) for e in entries]
    assert len(runs) == len({*runs}) == 6
    assert [e["diverged"] for e in entries if e["run"]["rate"] > 1] == [True, True]
    assert all(len(e["accuracy"]) == 2 for e in entries if not e["diverged"])
    assert not [*(tmp_path / "out" / "states").iterdir()]
    study.main(["table", *common])
    table = capsys.readouterr().out
    assert "| dirichlet-0.1 | 32 | kernel |" in table
    assert "- batch size 32, none: " in table
    study.main(["picture", *common])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
