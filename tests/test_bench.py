"""The bench: what it computes from times, what it plans, and what the command leaves behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from kernelnorm.cli import main
from kernelnorm.experiments import bench as package
from kernelnorm.experiments.bench import BAR_FORMAT, bench, make_plan, measure
from kernelnorm.experiments.bench.plan import BATCH, NONE, Case, Column, Plan, Row
from kernelnorm.experiments.bench.report import (
    WIDTH,
    TimeTable,
    draw,
    memory_lines,
    ratio_lines,
)
from kernelnorm.experiments.bench.results import Quartiles, Result, Variant
from kernelnorm.experiments.errors import RunError
from kernelnorm.norms import NORMS

ROW = Row(Case("vgg8", 8, 2), "float32", "eager", "train")
TINY: dict[str, Any] = {
    "networks": ["vgg8"],
    "sizes": [8],
    "batch_sizes": [2],
    "device": "cpu",
    "rounds": 2,
}
KERNEL, GROUP = Column("kernel"), Column("group")


def ignore(what: str, done: float) -> None:
    """Ignores the progress."""


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
    assert str(Quartiles(0.994, 1.0, 1.236)) == "1.00 ±0.12"


def test_ratios_are_of_the_same_round_and_of_the_better_memory_formats() -> None:
    made = hand_made()
    best = {norm: made.best(Column(norm)) for norm in ("batch", "kernel", "group", "layer")}
    formats = {norm: variant and variant.memory_format for norm, variant in best.items()}
    assert formats == {
        "batch": "channels_last",
        "kernel": "contiguous",
        "group": None,
        "layer": None,
    }
    assert made.ratio(KERNEL, BATCH) == Quartiles.of([1.5, 1.0, 2.0])
    assert made.ratio(KERNEL, NONE) == (3.5, 4.0, 4.0)
    assert made.ratio(GROUP, BATCH) is None


def test_record_has_every_time_and_the_summary() -> None:
    record = json.loads(json.dumps(hand_made().record((BATCH, NONE))))
    assert record["variants"][4] == {
        "norm": "kernel",
        "memory_format": "contiguous",
        "seconds": [3.0, 4.0, 4.0],
        "saved_bytes": 70,
        "peak_bytes": None,
        "failure": "",
        "way": "",
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
    common, heading = table.heading().splitlines()
    line, reason = table.line(hand_made()).splitlines()
    assert common == "All rows: VGG8, 8×8, batch 2, float32, eager."
    assert len(heading) == len(line)
    assert words(heading) == "BatchNorm no normalisation GroupNorm KernelNorm"
    assert words(line) == "train 2000 ms 0.50 ±0.06 failed 1.50 ±0.25"
    assert reason == "  GroupNorm, channels_last: failed: OutOfMemoryError: no more"
    case = "VGG8, 8×8, batch 2"
    columns = [*map(Column, norms)]
    floor = ratio_lines([hand_made()], columns, NONE)
    assert words(floor[1]) == f"{case} 1000 ms 2.00 ±0.50 failed 4.00 ±0.25"
    memory = memory_lines([hand_made()], columns, BATCH)
    assert memory[0].splitlines()[0] == "All rows: float32, eager, train, saved bytes."
    assert words(memory[1]) == f"{case} 0.0 MB 0.500 - 0.700"


def measured(plan: Plan) -> list[Result]:
    """Every variant of a plan took 1.5 ms."""
    return [
        Result(
            row,
            [Variant(c.norm, "channels_last", [0.0015] * 3, 10, way=c.way) for c in plan.columns],
        )
        for row in plan.rows
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"quick": True}, {"dtypes": ["float32", "bfloat16"]}, {"passes": ["train"]}],
)
@pytest.mark.parametrize("norms", [("none", "batch", "group", "layer", "kernel"), NORMS])
def test_tables_have_at_most_100_columns(options: dict[str, Any], norms: tuple[str, ...]) -> None:
    plan = make_plan(**options, norms=norms, device="cpu")
    results, table = measured(plan), TimeTable(plan)
    times = [table.heading(), *map(table.line, results)]
    floor = ratio_lines(results, plan.columns, NONE)
    for lines in (times, floor, memory_lines(results, plan.columns, BATCH)):
        assert max(len(line) for block in lines for line in block.splitlines()) <= WIDTH == 100
        if norms != NORMS:
            assert sum("KernelNorm" in block for block in lines) == 1
            assert all(line.endswith(" 1.00 ±0.00") for line in times[1:])


def test_a_case_is_said_once_above_its_rows() -> None:
    plan = make_plan(networks=["vgg8"], dtypes=["float32", "bfloat16"], device="cpu")
    table = TimeTable(plan)
    assert table.heading().splitlines()[0] == "All rows: eager."
    lines = [
        line.split("  ") for result in measured(plan) for line in table.line(result).split("\n")
    ]
    assert [line[0] or line[1] for line in lines[:6]] == [
        "VGG8, 32×32, batch 2, float32",
        "train",
        "inference",
        "VGG8, 32×32, batch 2, bfloat16",
        "train",
        "inference",
    ]


def test_the_bar_is_not_cut_at_80_columns() -> None:
    what = ", DenseNet-121, 160×160, batch 32: warm-up local_context"
    options = {"ncols": 80, "bar_format": BAR_FORMAT, "postfix": what[2:]}
    line = tqdm.format_meter(5, 100, 400.0, **options)
    assert line.endswith(f"left{what}")
    assert len(line) <= 80


def test_the_picture_names_the_rows_and_starts_at_the_data() -> None:
    figure = draw(measured(make_plan(networks=["resnet18"], device="cpu")), [BATCH, KERNEL], BATCH)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == [f"ResNet-18, 192×192, batch 2\n{p}" for p in ("train", "inference")]
    assert axes.get_title() == "All rows: float32, eager"
    assert axes.get_xlim() == (0.9, 1.1)
    assert draw([hand_made()], [NONE, BATCH, KERNEL], BATCH).axes[0].get_xlim()[0] < 0.375


def test_without_batch_norms_times_there_are_those_of_the_others() -> None:
    failed = Variant("batch", "channels_last", failure="failed: RuntimeError: why")
    made = result(failed, Variant("kernel", "channels_last", [0.25, 0.25]))
    plan = make_plan(**TINY, norms=["batch", "kernel"])
    line, reason = TimeTable(plan).line(made).splitlines()
    assert line.split()[-3:] == ["failed", "250", "ms"]
    assert "why" in reason
    assert ratio_lines([made], plan.columns, NONE) == []
    assert memory_lines([made], plan.columns, BATCH) == []
    draw([made], plan.columns, BATCH)


def test_plan_without_options() -> None:
    plan = make_plan()
    assert [str(row.case) for row in plan.rows][::2] == [
        "VGG8, 32×32, batch 2",
        "VGG8, 32×32, batch 32",
        "ResNet-18, 192×192, batch 2",
        "ResNet-18, 192×192, batch 32",
        "DenseNet-121, 160×160, batch 2",
        "DenseNet-121, 160×160, batch 32",
    ]
    assert [row.pass_ for row in plan.rows] == ["train", "inference"] * 6
    assert [*map(str, plan.columns)] == ["none", "batch", "group", "layer", "kernel"]
    assert plan.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_quick_plan() -> None:
    plan = make_plan(quick=True)
    assert [str(row.case) for row in plan.rows][::2] == [
        "VGG8, 32×32, batch 2",
        "VGG8, 32×32, batch 32",
        "ResNet-18, 96×96, batch 4",
        "DenseNet-121, 64×64, batch 4",
    ]
    assert (plan.rounds, plan.seconds) == (9, 4.0)
    assert make_plan(quick=True, rounds=3).rounds == 3


def test_sizes_follow_the_networks() -> None:
    networks = ["resnet50", "vgg8", "efficientnet_b0"]
    plan = make_plan(networks=networks, batch_sizes=[1], passes=["train"])
    assert [row.case.image_size for row in plan.rows] == [192, 32, 192]
    plan = make_plan(networks=["resnet50", "vgg8"], sizes=[224, 8], modes=["eager", "compile"])
    assert [row.case.image_size for row in plan.rows] == [224] * 8 + [8] * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ["vgg9"]}, "--networks: unknown 'vgg9', choose from: vgg8, resnet18"),
        ({"networks": ["vgg8", "vgg8"]}, "--networks must have each name once, got vgg8,vgg8"),
        ({"sizes": [32, 64]}, "--sizes must have a number for each of the 3 networks"),
        ({"sizes": [32, 0, 32]}, "--sizes must be at least 1, got 0"),
        ({"batch_sizes": [2, -1]}, "--batch-sizes must be at least 1, got -1"),
        ({"norms": ["batch", "weight"]}, "--norms: unknown 'weight', choose from: batch, group"),
        (
            {"norms": ["none", "kernel"]},
            "--norms must have batch, which it compares with, got none,kernel",
        ),
        ({"passes": ["backward"]}, "--passes: unknown 'backward', choose from: train, inference"),
        ({"dtypes": ["float64"]}, "--dtypes: unknown 'float64', choose from: float32, bfloat16"),
        ({"dtypes": ["float16"]}, "--dtypes float16 needs a CUDA device, got --device cpu"),
        (
            {"modes": ["fast"]},
            "--modes: unknown 'fast', choose from: eager, compile, reduce-overhead",
        ),
        ({"modes": ["reduce-overhead"]}, "--modes reduce-overhead needs a CUDA device"),
        (
            {"memory_formats": ["last"]},
            "--memory-formats: unknown 'last', choose from: channels_last",
        ),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"rounds": 1}, "--rounds must be at least 2, got 1"),
        ({"seconds": -1}, "--seconds must be at least 0, got -1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=f"^{re.escape(message)}"):
        make_plan(device="cpu", **options)


def test_a_wrong_option_creates_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--modes must have each name once"):
        main(["bench", "--device=cpu", f"--out={tmp_path / 'out'}", "--modes=eager,eager"])
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
