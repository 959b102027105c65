"""The bench: what it computes from times, what it plans, and what the command leaves behind."""

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
from kernelnorm.experiments.bench.plan import Case, Plan, Row
from kernelnorm.experiments.bench.report import TimeTable, draw, floor_lines, memory_lines
from kernelnorm.experiments.bench.results import Quartiles, Result, Variant
from kernelnorm.experiments.runs import RunError

ROW = Row(Case("vgg8", 8, 2), "float32", "eager", "train")
TINY: dict[str, Any] = {
    "networks": ["vgg8"],
    "sizes": [8],
    "batch_sizes": [2],
    "device": "cpu",
    "rounds": 2,
}


def ignore(what: str, done: float) -> None:
    """No one looks at the progress."""


def result(*variants: Variant) -> Result:
    return Result(ROW, variants)


def words(line: str) -> str:
    return " ".join(line.split())


def hand_made() -> Result:
    return result(
        Variant("none", "channels_last", [1.0, 1.0, 1.0], saved_bytes=50),
        Variant("batch", "channels_last", [2.0, 4.0, 2.0], saved_bytes=100),
        Variant("batch", "contiguous", [3.0, 5.0, 3.0], saved_bytes=200),
        Variant("kernel", "channels_last", [9.0, 9.0, 9.0], saved_bytes=60),
        Variant("kernel", "contiguous", [3.0, 4.0, 4.0], saved_bytes=70),
        Variant("group", "channels_last", failure="failed: OutOfMemoryError: no more"),
    )


def test_quartiles() -> None:
    assert Quartiles.of([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)
    assert Quartiles.of([1.0, 3.0]) == (1.5, 2.0, 2.5)  # within the values
    assert str(Quartiles(0.994, 1.0, 1.236)) == "1.00 (0.99-1.24)"


def test_ratios_are_of_the_same_round_and_of_the_better_memory_formats() -> None:
    made = hand_made()
    best = {norm: made.best(norm) for norm in ("batch", "kernel", "group", "layer")}
    formats = {norm: variant and variant.memory_format for norm, variant in best.items()}
    assert formats == {
        "batch": "channels_last",
        "kernel": "contiguous",
        "group": None,
        "layer": None,
    }
    assert made.ratio("kernel", "batch") == Quartiles.of([1.5, 1.0, 2.0])
    assert made.ratio("kernel", "none") == (3.5, 4.0, 4.0)
    assert made.ratio("group", "batch") is None


def test_record_has_every_time_and_the_summary() -> None:
    record = json.loads(json.dumps(hand_made().record()))
    assert record["variants"][4] == {
        "norm": "kernel",
        "memory_format": "contiguous",
        "seconds": [3.0, 4.0, 4.0],
        "saved_bytes": 70,
        "peak_bytes": None,
        "failure": "",
    }
    assert record["summary"]["kernel"] == {
        "memory_format": "contiguous",
        "seconds": [3.5, 4.0, 4.0],
        "to_batch": [1.25, 1.5, 1.75],
        "to_none": [3.5, 4.0, 4.0],
    }
    assert "group" not in record["summary"]
    names = ("network", "image_size", "batch_size", "dtype", "mode", "pass")
    assert [record[name] for name in names] == ["vgg8", 8, 2, "float32", "eager", "train"]


def test_tables() -> None:
    norms = ["none", "batch", "group", "kernel"]
    table = TimeTable(make_plan(**{**TINY, "norms": norms}))
    heading, (line, reason) = table.heading(), table.line(hand_made()).splitlines()
    assert len(heading) == len(line)
    assert heading.split()[:4] == ["case", "pass", "dtype", "mode"]
    assert words(line) == (
        "vgg8 8px x 2 train float32 eager 2000 0.50 (0.38-0.50) failed 1.50 (1.25-1.75)"
    )
    assert reason == "  GroupNorm, channels_last: failed: OutOfMemoryError: no more"
    assert words(floor_lines([hand_made()], norms)[1]) == (
        "vgg8 8px x 2 train float32 eager 1000 2.00 (2.00-3.00) failed 4.00 (3.50-4.00)"
    )
    assert words(memory_lines([hand_made()], norms)[1]) == (
        "vgg8 8px x 2 train float32 eager kept 0.0 0.500 - 0.700"
    )


def test_without_batch_norms_times_there_are_those_of_the_others() -> None:
    failed = Variant("batch", "channels_last", failure="failed: RuntimeError: why")
    made = result(failed, Variant("kernel", "channels_last", [0.25, 0.25]))
    norms = ["batch", "kernel"]
    line, reason = TimeTable(make_plan(**TINY, norms=norms)).line(made).splitlines()
    assert line.split()[-3:] == ["failed", "250", "ms"]
    assert "why" in reason
    assert floor_lines([made], norms) == memory_lines([made], norms) == []
    draw([made], norms)


def test_plan_without_options() -> None:
    plan = make_plan()
    assert [str(row.case) for row in plan.rows][::2] == [
        "vgg8 32px x 2",
        "vgg8 32px x 32",
        "resnet18 192px x 2",
        "resnet18 192px x 32",
        "densenet121 160px x 2",
        "densenet121 160px x 32",
    ]
    assert [row.pass_ for row in plan.rows] == ["train", "inference"] * 6
    assert plan.norms == ("none", "batch", "group", "layer", "kernel")
    assert plan.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_quick_plan() -> None:
    plan = make_plan(quick=True)
    assert [str(row.case) for row in plan.rows][::2] == [
        "vgg8 32px x 2",
        "vgg8 32px x 32",
        "resnet18 96px x 4",
        "densenet121 64px x 4",
    ]
    assert (plan.rounds, plan.seconds) == (9, 4.0)
    assert make_plan(quick=True, rounds=3).rounds == 3


def test_sizes_follow_the_networks() -> None:
    plan = make_plan(networks=["resnet50", "vgg8"], batch_sizes=[1], passes=["train"])
    assert [row.case.image_size for row in plan.rows] == [192, 32]
    plan = make_plan(networks=["resnet50", "vgg8"], sizes=[224, 8], modes=["eager", "compile"])
    assert [row.case.image_size for row in plan.rows] == [224] * 8 + [8] * 8


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--networks=vgg9", "--networks: unknown 'vgg9', choose from: vgg8, resnet18"),
        ("--networks=vgg8,vgg8", "--networks must have each name once, got vgg8,vgg8"),
        ("--sizes=32,64", "--sizes must have a number for each of the 3 networks"),
        ("--sizes=32,0,32", "--sizes must be at least 1, got 0"),
        ("--batch-sizes=2,-1", "--batch-sizes must be at least 1, got -1"),
        ("--norms=batch,weight", "--norms: unknown 'weight', choose from: batch, group"),
        ("--norms=none,kernel", "--norms must have batch, which it compares with, got none,kernel"),
        ("--passes=backward", "--passes: unknown 'backward', choose from: train, inference"),
        ("--dtypes=float64", "--dtypes: unknown 'float64', choose from: float32, bfloat16"),
        ("--dtypes=float16", "--dtypes float16 needs a CUDA device, got --device cpu"),
        ("--modes=fast", "--modes: unknown 'fast', choose from: eager, compile, reduce-overhead"),
        ("--modes=reduce-overhead", "--modes reduce-overhead needs a CUDA device"),
        ("--memory-formats=last", "--memory-formats: unknown 'last', choose from: channels_last"),
        ("--threads=0", "--threads must be at least 1, got 0"),
        ("--rounds=1", "--rounds must be at least 2, got 1"),
        ("--seconds=-1", "--seconds must be at least 0, got -1"),
    ],
)
def test_options_are_checked_before_any_work(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        main(["bench", "--device=cpu", f"--out={tmp_path / 'out'}", option])
    assert str(error.value.code).startswith(f"kernelnorm: {message}")
    assert not (tmp_path / "out").exists()


def test_quick_has_its_own_cases() -> None:
    with pytest.raises(RunError, match="leave out --quick, or --networks, --sizes"):
        make_plan(quick=True, networks=["vgg8"], sizes=[32])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(RunError, match="--device cuda: PyTorch finds no CUDA device here"):
        make_plan(device="cuda")


@pytest.mark.parametrize(
    ("option", "message"),
    [("--batch-sizes=two", "two"), ("--device=gpu", "gpu"), ("--rounds=few", "few")],
)
def test_what_is_not_a_number_or_a_device(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", option])
    assert message in capsys.readouterr().err


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file cannot be made: File exists"):
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
    assert "threads: 1" in printed.splitlines()[0]
    assert printed.count("\nvgg8 8px x 2  train") == 6  # two data types, three tables
    assert printed.count("\nvgg8 8px x 2  inference") == 4  # which keeps nothing
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
