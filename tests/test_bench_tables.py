"""What the bench computes from times: ratios, tables and pictures."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tqdm import tqdm

from kernelnorm.experiments.bench import BAR_FORMAT, make_plan
from kernelnorm.experiments.bench.plan import BATCH, NONE, Column
from kernelnorm.experiments.bench.report import (
    WIDTH,
    TimeTable,
    draw,
    memory_lines,
    ratio_lines,
)
from kernelnorm.experiments.bench.results import Quartiles, Variant
from kernelnorm.norms import NORMS
from tests.bench_results import GROUP, KERNEL, TINY, hand_made, measured, result, words


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
    record = json.loads(json.dumps(hand_made().as_dict((BATCH, NONE))))
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
