"""The bench measures, in turns, and its command leaves files behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kernelnorm.cli import main
from kernelnorm.experiments import bench as package
from kernelnorm.experiments.bench import bench, make_plan, measure
from kernelnorm.experiments.bench.plan import Plan, Row
from kernelnorm.experiments.bench.results import Result, Variant
from kernelnorm.experiments.errors import RunError
from tests.bench_results import ROW, TINY, hand_made


def ignore(what: str, done: float) -> None:
    """Ignores the progress."""


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot create the folder .*file: a file has this name"):
        bench(make_plan(**TINY), tmp_path / "file")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def test_command(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = ["--networks=vgg8", "--sizes=8", "--batch-sizes=2", "--rounds=2", "--device=cpu"]
    main(["bench", *options, "--dtypes=float32,bfloat16", "--threads=1", f"--out={out}"])
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "threads: 1" in printed.split("\n\n")[0].replace("\n", " ")
    assert printed.count("\n  train  ") == 4  # two data types, two tables
    assert printed.count("\n  inference  ") == 4
    assert printed.count("\nbfloat16  ") == 1  # the table of the memory has no inference
    assert str(out / "bench.json") in printed
    with Image.open(out / "bench.png") as picture:
        assert picture.width > 1000

    content = json.loads((out / "bench.json").read_text())
    assert content["machine"]["threads"] == 1
    assert [result["pass"] for result in content["results"]] == ["train", "inference"] * 2
    for measured in content["results"]:
        norms = [variant["norm"] for variant in measured["variants"]]
        assert norms == ["none", "batch", "group", "layer", "kernel"]
        assert all(len(variant["seconds"]) == 2 for variant in measured["variants"])
        assert measured["summary"]["batch"]["to_batch"] == [1, 1, 1]
        saved = {variant["norm"]: variant["saved_bytes"] for variant in measured["variants"]}
        if measured["pass"] == "train":
            assert 0 < saved["kernel"] < saved["batch"]
        else:
            assert set(saved.values()) == {None}


def test_a_variant_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """InstanceNorm refuses the last maps, of one position."""
    options = {**TINY, "norms": ["none", "batch", "instance"], "passes": ["train"]}
    (measured,) = bench(make_plan(**options), tmp_path)
    assert [len(variant.seconds) for variant in measured.variants] == [2, 2, 0]
    assert "InstanceNorm, channels_last: failed: ValueError" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert record["variants"][2]["failure"].startswith("failed: ValueError: Expected more than 1")


def test_one_that_fails_late_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def fail_late(row: Row, variant: Variant, device: torch.device) -> tuple[Any, float]:
        def step() -> None:
            nonlocal calls
            if variant.norm == "kernel":
                calls += 1
                if calls == 2:
                    raise RuntimeError("out of memory\nmore")

        return step, 1.0

    monkeypatch.setattr(measure, "_warm_up", fail_late)
    plan = make_plan(**{**TINY, "norms": ["batch", "kernel"], "rounds": 4})
    batch, kernel = measure.measure_row(ROW, plan, ignore).variants
    assert (len(batch.seconds), kernel.seconds, calls) == (4, [], 2)
    assert kernel.failure == "failed: RuntimeError: out of memory"


def test_rounds_end_with_the_time_but_not_before_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_warm_up", lambda *_: (lambda: None, 1.0))
    for seconds, rounds in ((0.0, 3), (600.0, 9)):
        plan = make_plan(**{**TINY, "rounds": 9, "seconds": seconds})
        measured = measure.measure_row(ROW, plan, ignore)
        assert [len(variant.seconds) for variant in measured.variants] == [rounds] * 5


def test_variants_take_turns_in_changing_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def noting(row: Row, variant: Variant, device: torch.device) -> tuple[Any, float]:
        return lambda: turns.append(variant.norm), 1.0

    monkeypatch.setattr(measure, "_warm_up", noting)
    measure.measure_row(ROW, make_plan(**{**TINY, "rounds": 6}), ignore)
    rounds = [tuple(turns[i : i + 5]) for i in range(0, 30, 5)]
    assert all(len({*one}) == 5 for one in rounds)
    assert len({*rounds}) > 3


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("eager", []), ("compile", [None]), ("reduce-overhead", ["reduce-overhead"])],
)
def test_modes(mode: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | None] = []

    def compile_(network: torch.nn.Module, *, dynamic: bool, mode: str | None) -> None:
        modes.append(mode)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    plan = make_plan(**{**TINY, "norms": ["batch"]})
    (batch,) = measure.measure_row(Row(ROW.case, "float32", mode, "train"), plan, ignore).variants
    assert batch.failure == ""
    assert modes == expected
    assert (batch.saved_bytes is None) == (mode == "reduce-overhead")


def test_what_was_measured_is_written_whole_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_inference(row: Row, plan: Plan, progress: Callable[[str, float], None]) -> Result:
        if row.pass_ == "inference":
            raise KeyboardInterrupt
        return hand_made()

    monkeypatch.setattr(package, "measure_row", stop_at_inference)
    with pytest.raises(KeyboardInterrupt):
        bench(make_plan(**TINY), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bench.json", "bench.png"]
    (record,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert record["pass"] == "train"
