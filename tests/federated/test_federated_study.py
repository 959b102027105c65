"""The study's program: which runs there are, and what becomes of their results."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import study
from conftest import ROOT
from PIL import Image
from study import MORE_SEEDS, NORMS, PARTITIONS, SEEDS, TUNED, Run, planned, score

from kernelnorm.experiments.style import LABELS
from kernelnorm.experiments.tuning import TUNING_SEED

ROUNDS, IMAGES = 2, 100


def entry(run: Run, accuracy: float, diverged: bool = False) -> dict[str, Any]:
    return {
        "run": asdict(run),
        "settings": run.digest,
        "accuracy": [0.1, accuracy],
        "diverged": diverged,
    }


def test_a_seed_of_its_own_chooses_the_rates_of_all_partitions() -> None:
    results: dict[Run, dict[str, Any]] = {}
    while missing := [
        run for run in planned(results, (8, 32), ROUNDS, IMAGES) if run not in results
    ]:
        run = missing[0]
        best = 0.1 if run.norm == "kernel" else 0.01
        diverged = run.norm == "none" and run.rate >= best
        results[run] = entry(run, 1 / (1 + abs(math.log(run.rate / best))), diverged)
    plan = [*planned(results, (8, 32), ROUNDS, IMAGES)]
    assert len(plan) == len({*plan}) == len(results)
    tuning = [run for run in plan if run.seed == TUNING_SEED]
    assert {run.partition for run in tuning} == {TUNED}
    assert {run.rate for run in tuning if run.norm == "kernel"} == {0.003, 0.01, 0.03, 0.1, 0.3}
    repeated = [run for run in plan if run.seed != TUNING_SEED]
    of_a_norm = len(SEEDS) + len(PARTITIONS) - 1
    assert len(repeated) == 2 * (len(NORMS) * of_a_norm + sum(map(len, MORE_SEEDS.values())))
    rates = {"kernel": 0.1, "none": 0.003}
    assert all(run.rate == rates.get(run.norm, 0.01) for run in repeated)


def test_a_run_that_diverged_has_no_score() -> None:
    run = Run("even", 8, "none", 0.1, 0, ROUNDS, IMAGES)
    assert score(entry(run, 0.5)) == pytest.approx(0.3)
    assert score(entry(run, 0.5, diverged=True)) == -math.inf


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, label, i in itertools.product(("train", "test"), range(10), range(12)):
        folder = tmp_path / "data" / "cifar10" / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (25 * label, 10 * i, 0)).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "docs" / "results" / "federated"
    study.main(["table", "--out", str(folder)])
    printed = capsys.readouterr().out
    page = folder.with_suffix(".md").read_text()
    names = {norm: LABELS.get(norm, "FixBN") for norm in NORMS}
    columns = ("even", "dirichlet-0.5", "dirichlet-0.1", "2-classes")
    for size in (32, 8):
        rows = re.findall(rf"\| (\S+) \| {size} \| (\w+) \| (.*?) \| .*? \| (\S+) \|", printed)
        cells = {(norm, clients): text for clients, norm, text, _ in rows}
        rates = {norm: rate for _, norm, _, rate in rows}
        shown = page.split(f"| batch size {size} | rate |")[1].split("\n\n")[0].splitlines()[2:]
        assert shown == [
            f"| {names[norm]} | {rates[norm]} | {' | '.join(cells[norm, c] for c in columns)} |"
            for norm in NORMS
        ]
    line = r"- batch size (\d+), (\w+): (\S+) \((.*), (\d) pairs\)"
    found = {(int(s), n): (pairs, f"{d} ({i})") for s, n, d, i, pairs in re.findall(line, printed)}
    shown = page.split("| KernelNorm minus |")[1].split("\n\n")[0].splitlines()[2:]
    assert shown == [
        f"| {names[norm]} | {found[8, norm][0]} | {found[32, norm][1]} | {found[8, norm][1]} |"
        for norm in NORMS[1:]
    ]


def test_the_default_folder_is_not_that_of_the_committed_results() -> None:
    assert study.make_parser().parse_args(["run"]).out == Path("runs/federated-study")


def test_runs_are_trained_recorded_shown_and_not_repeated(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(study, "NORMS", ("kernel", "none"))
    monkeypatch.setattr(study, "PARTITIONS", {"dirichlet-0.1": {"partition": "even"}})
    monkeypatch.setattr(study, "RATES", (0.01, 1e20))
    monkeypatch.setattr(study, "FIRST_RATE", {32: 0.01})
    monkeypatch.setattr(study, "SEEDS", (1,))
    monkeypatch.setattr(study, "MORE_SEEDS", {})
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
    entries = [{**e, "diverged": e["diverged"] or e["run"]["norm"] == "none"} for e in entries]
    file.write_text("".join(json.dumps(e) + "\n" for e in entries))
    study.main(["table", *common])
    assert "| all | 32 | none | diverged at every learning rate | | |" in capsys.readouterr().out
    study.main(["picture", *common])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
