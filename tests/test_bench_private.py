"""``kernelnorm bench --private``: what it plans, compares and measures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("opacus")

from kernelnorm import KernelNorm2d, KNConv2d
from kernelnorm.cli import main
from kernelnorm.experiments.bench import make_plan, measure
from kernelnorm.experiments.bench.private import allocated_peak, group_norm_twin
from kernelnorm.experiments.bench.report import TimeTable, draw, memory_lines, ratio_lines
from kernelnorm.experiments.bench.results import Result, Variant
from kernelnorm.experiments.errors import RunError
from kernelnorm.models import create_model, vgg8
from tests.bench_results import words


def test_private_plan() -> None:
    plan = make_plan(private=True, device="cpu")
    assert [str(row.case) for row in plan.rows] == [
        "VGG8, 32×32, batch 64",
        "KNResNet-13, 32×32, batch 64",
    ]
    ways = ["", "_bookkeeping", "_hooks", "_ghost"]
    assert [*map(str, plan.columns)] == [norm + way for norm in ("kernel", "group") for way in ways]
    quick = make_plan(private=True, quick=True, device="cpu")
    assert [row.case.batch_size for row in quick.rows] == [16, 16]
    assert {row.pass_ for row in [*plan.rows, *quick.rows]} == {"private"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norms": ["batch", "kernel"]}, "--private has its own norms: leave out --private, or"),
        ({"passes": ["train"]}, "--private has its own passes: leave out --private, or --passes"),
        ({"modes": ["eager", "compile"]}, "--private needs --modes eager, got eager,compile"),
    ],
)
def test_private_decides_itself(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=f"^{re.escape(message)}"):
        make_plan(private=True, device="cpu", **options)


def test_private_needs_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelnorm.experiments.bench.plan.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'kernelnorm\[private\]'"):
        make_plan(private=True, device="cpu")


def test_private_tables() -> None:
    plan = make_plan(private=True, networks=["vgg8"], sizes=[8], batch_sizes=[2], device="cpu")
    seconds = [[1.0, 2.0], [1.5, 3.0], [4.0, 8.0], [2.0, 4.0]] * 2
    variants = [
        Variant(column.norm, "channels_last", times, peak_bytes=1000 * (i + 1), way=column.way)
        for i, (column, times) in enumerate(zip(plan.columns, seconds, strict=True))
    ]
    made = Result(plan.rows[0], variants)
    table = TimeTable(plan)
    lines = [*table.heading().splitlines()[1:], *table.line(made).splitlines()]
    assert [*map(words, lines)] == [
        "KernelNorm bookkeeping hooks ghost",
        "GroupNorm bookkeeping hooks ghost",
        "VGG8, 8×8, batch 2 1500 ms 1.50 ±0.00 4.00 ±0.00 2.00 ±0.00",
        "1.00 ±0.00 1.50 ±0.00 4.00 ±0.00 2.00 ±0.00",
    ]
    assert len({*map(len, lines)}) == 1
    _, line = ratio_lines([made], plan.columns, plan.bases[1])
    assert words(line).endswith("0.25 ±0.00 0.38 ±0.00 6000 ms 0.50 ±0.00")
    _, line = memory_lines([made], plan.columns, plan.bases[0])
    assert words(line) == "VGG8, 8×8, batch 2 0.0 MB 2.000 3.000 4.000 5.000 6.000 7.000 8.000"
    summary = made.as_dict(plan.bases)["summary"]["kernel_bookkeeping"]
    assert summary["to_kernel"] == (1.5, 1.5, 1.5)
    assert summary["to_group_hooks"] == (0.375, 0.375, 0.375)
    draw([made], plan.columns, plan.bases[0])


def test_private_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every variant is measured, and no message of Opacus or the profiler is shown."""
    monkeypatch.setattr(measure, "_network", lambda case, norm: vgg8(norm, width=0.1))
    options = ["--networks=vgg8", "--sizes=8", "--batch-sizes=2", "--rounds=2", "--device=cpu"]
    main(["bench", "--private", *options, f"--out={tmp_path}"])
    printed = capfd.readouterr()
    assert "ratio to the hooks of Opacus with GroupNorm" in printed.out
    assert "All rows: float32, eager, private, peak bytes." in printed.out
    assert "profiler" not in printed.err
    assert "RNG" not in printed.err
    (record,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert {variant["failure"] for variant in record["variants"]} == {""}
    peaks = {v["way"]: v["peak_bytes"] for v in record["variants"] if v["norm"] == "kernel"}
    assert peaks[""] < peaks["bookkeeping"] < peaks["hooks"]


def test_peak_of_what_is_allocated() -> None:
    """Beside what was allocated before, which is freed on the way."""
    before = [torch.ones(1000)]

    def step() -> None:
        one = torch.ones(5000)
        before.clear()
        del one
        torch.ones(2000)

    assert allocated_peak(step) == 20_000


def test_twin_with_group_norm() -> None:
    network = create_model("knresnet13", num_classes=4)
    twin = group_norm_twin(network)
    layers = [*twin.modules()]
    assert sum(isinstance(layer, torch.nn.GroupNorm) for layer in layers) == 12
    assert not any(isinstance(layer, KNConv2d | KernelNorm2d) for layer in layers)
    assert any(isinstance(layer, KNConv2d) for layer in network.modules())
    weights = [[p.shape for p in made.parameters() if p.dim() == 4] for made in (network, twin)]
    assert weights[0] == weights[1]
    assert twin(torch.randn(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Secure RNG turned off")
@pytest.mark.parametrize("network", ["vgg8", "knresnet13"])
def test_bookkeeping_takes_little_more_memory_than_an_ordinary_step(network: str) -> None:
    (row,) = make_plan(private=True, networks=[network], device="cpu").rows
    peaks = []
    for way in ("", "bookkeeping"):
        variant = Variant("kernel", "channels_last", way=way)
        measure._warm_up(row, variant, torch.device("cpu"))
        peaks.append(variant.peak_bytes)
    assert peaks[1] <= 1.3 * peaks[0]
