"""The leaderboard ranks norms from run folders, beside what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelnorm.experiments.bench import saved_bytes
from kernelnorm.experiments.networks import build_network
from kernelnorm.experiments.private_options import Privacy
from kernelnorm.experiments.report import report
from tests.run_folders import write_result, write_run

pytestmark = pytest.mark.usefixtures("undrawn")

FOUND = {"image_shape": [3, 16, 16], "classes": ["cat", "dog"]}


def standings_of(root: Path) -> list[dict[str, Any]]:
    """The leaderboard of the only section of the report."""
    numbers = json.loads(report(root).with_name("report.json").read_text())
    (section,) = numbers["sections"]
    standings: list[dict[str, Any]] = section["leaderboard"]
    return standings


def row_of(root: Path, *starts: str) -> list[str]:
    """The row of the leaderboard in Markdown that begins with these cells."""
    text = (root / "report" / "report.md").read_text().split("### Leaderboard")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return next(row for row in rows if row[: len(starts)] == [*starts])


def test_norms_are_ranked_by_mean_accuracy_at_each_batch_size(tmp_path: Path) -> None:
    accuracies = {"batch": {2: (60.0,), 32: (82.0, 84.0)}, "nf": {2: (70.0,), 32: (80.0, 85.0)}}
    for norm, by_size in accuracies.items():
        for size, seeds in by_size.items():
            for seed, accuracy in enumerate(seeds, 1):
                write_result(tmp_path, accuracy, norm=norm, batch_size=size, seed=seed)
    write_run(tmp_path, [], norm="none", failure=("diverged", "the loss is nan"))
    places = [(s["batch_size"], s["rank"], s["norm"], s["group"]) for s in standings_of(tmp_path)]
    assert places == [
        (2, 1, "nf", "weight-based"),
        (2, 2, "batch", "batch-dependent"),
        (32, 1, "batch", "batch-dependent"),
        (32, 2, "nf", "weight-based"),
        (32, None, "none", "batch-independent"),
    ]
    row = row_of(tmp_path, "32", "1", "BatchNorm")
    assert row[3:9] == ["batch-dependent", "83.00 ± 1.41", "2", "82.00", "-", "6"]
    assert row[-2:] == ["no", ""]
    assert row_of(tmp_path, "2", "1")[-2:] == ["yes", "AGC"]
    lost = ["no normalisation", "batch-independent", "diverged", "-", "-", "-", "-"]
    assert row_of(tmp_path, "32", "-")[2:9] == lost


def test_norms_of_which_a_seed_diverged_come_last(tmp_path: Path) -> None:
    """Neither does the run that chose the rate stand in for repetitions that diverged."""
    nan = ("diverged", "the loss is nan")
    for norm, accuracy, lost in (("kernel", 55.0, 0), ("frn", 60.0, 3), ("nf", 70.0, 1)):
        for lr, change in ((0.1, 0.0), (0.01, -9.0)):
            write_result(tmp_path, accuracy + change, norm=norm, lr=lr, seed=0)
        for seed in (1, 2, 3):
            if seed > 3 - lost:
                write_run(tmp_path, [], norm=norm, lr=0.1, seed=seed, failure=nan)
            else:
                write_result(tmp_path, accuracy, norm=norm, lr=0.1, seed=seed)
    standings = standings_of(tmp_path)
    assert [(s["rank"], s["norm"], s["diverged"]) for s in standings] == [
        (1, "kernel", 0),
        (2, "nf", 1),
        (None, "frn", 3),
    ]
    assert standings[1]["epochs"] == 6
    assert row_of(tmp_path, "32", "2")[5] == "2, 1 diverged"
    assert row_of(tmp_path, "32", "-")[2:6] == [
        "FRN + TLU",
        "batch-independent",
        "3 repetitions diverged",
        "-",
    ]


def test_norms_without_an_accuracy_have_no_rank_and_come_last(tmp_path: Path) -> None:
    nan = ("diverged", "the loss is nan")
    write_run(tmp_path, [], norm="group", failure=nan)
    write_run(tmp_path, [], norm="batch", failure=("failed", "too little memory"))
    write_result(tmp_path, 80.0, norm="kernel", seed=1)
    write_run(tmp_path, [], norm="kernel", seed=2, failure=nan)
    standings = [(s["rank"], s["norm"], s["absence"]) for s in standings_of(tmp_path)]
    assert standings == [(1, "kernel", ""), (None, "batch", "failed"), (None, "group", "diverged")]


def test_equal_norms_have_one_rank(tmp_path: Path) -> None:
    for norm, accuracy in (("batch", 80.0), ("group", 80.0), ("layer", 70.0)):
        write_result(tmp_path, accuracy, norm=norm)
    assert [standing["rank"] for standing in standings_of(tmp_path)] == [1, 1, 3]


def test_kernel_is_compared_with_each_norm_seed_by_seed(tmp_path: Path) -> None:
    for seed, base in ((1, 50.0), (2, 60.0), (3, 70.0)):
        write_result(tmp_path, base + 5, norm="kernel", seed=seed)
        write_result(tmp_path, base + seed, norm="group", seed=seed)
    group = standings_of(tmp_path)[1]
    assert group["to_kernel"]["mean"] == pytest.approx(3)
    assert row_of(tmp_path, "32", "2")[7] == "+0.52 to +5.48"


def test_a_rate_without_a_run_of_the_tuning_seed_counts(tmp_path: Path) -> None:
    write_result(tmp_path, 50.0, lr=0.01, seed=0)
    write_result(tmp_path, 20.0, norm="batch")
    for seed in (1, 2, 3):
        write_result(tmp_path, 90.0, lr=0.05, seed=seed)
    assert standings_of(tmp_path)[0]["accuracy"] == {"mean": 90.0, "deviation": 0.0, "runs": 3}


def test_one_norm_has_no_leaderboard(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0)
    assert standings_of(tmp_path) == []
    assert "Leaderboard" not in (tmp_path / "report" / "report.md").read_text()


def test_runs_with_another_clipping_factor_have_their_own_section(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0, norm="nf")
    write_result(tmp_path, 81.0, norm="batch")
    write_result(tmp_path, 82.0, norm="nf", agc=0.5)
    numbers = json.loads(report(tmp_path).with_name("report.json").read_text())
    runs = [[run["norm"] for run in section["runs"]] for section in numbers["sections"]]
    assert sorted(runs) == [["batch", "nf"], ["nf"]]
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("adaptive gradient clipping at 0.5; 32-true.") == 1


def test_epochs_are_counted_to_the_loss_that_the_best_three_reach(tmp_path: Path) -> None:
    losses = {  # from the most to the least accurate norm; the lowest loss is not always the last
        "kernel": [[2.0, 0.9, 0.30049, 0.4], [2.0, 0.3, 0.2, 0.1]],
        "group": [[0.5, 0.3001, 0.2, 0.1]],
        "layer": [[2.0, 1.5, 1.0, 0.05]],
        "batch": [[0.1, 0.1, 0.1, 0.1], [2.0, 1.5, 1.0, 0.31]],
        "none": [[2.0, 1.5, 1.0, 0.302]],
    }
    for place, (norm, runs) in enumerate(losses.items()):
        for seed, run in enumerate(runs):
            accuracies = [90.0 - place] * len(run)
            write_run(tmp_path, accuracies, norm=norm, seed=seed, epochs=len(run), losses=run)
    standings = standings_of(tmp_path)
    # 0.30049, KernelNorm's first seed, is the highest of the lowest losses, rounded up.
    assert {standing["loss"] for standing in standings} == {0.301}
    epochs = {standing["norm"]: standing["epochs"] for standing in standings}
    assert epochs == {"kernel": 2.5, "group": 2, "layer": 4, "batch": None, "none": None}
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Epochs: to a training loss of 0.301 at batch size 32, median" in text


def test_time_of_a_step_is_a_median(tmp_path: Path) -> None:
    for seed, speed in enumerate((16.0, 64.0, 128.0)):
        write_result(tmp_path, 80.0, norm="batch", seed=seed, images_per_second=speed)
    write_result(tmp_path, 79.0, norm="group", images_per_second=None)  # of an older version
    batch, group = standings_of(tmp_path)
    assert (batch["seconds_per_step"], group["seconds_per_step"]) == (0.5, None)
    assert row_of(tmp_path, "32", "1")[9] == "500"
    assert row_of(tmp_path, "32", "2")[9] == "-"
    elsewhere = {"later_environments": [{"device": "cuda: H100"}]}
    write_result(tmp_path, 78.0, norm="layer", found=elsewhere)
    assert {standing["seconds_per_step"] for standing in standings_of(tmp_path)} == {None}
    assert "; later device cuda: H100" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("first", "second", "comparable"),
    [
        ({"threads": 1}, {"threads": 64}, False),
        ({"threads": 1}, {"threads": 1, "compile": True}, False),
        ({"processes": 1}, {"processes": 4}, False),
        ({"threads": 1}, {}, True),  # of an older version, which did not record them
    ],
)
def test_times_are_shown_if_runs_were_executed_alike(
    first: dict[str, Any], second: dict[str, Any], comparable: bool, tmp_path: Path
) -> None:
    for norm, place in (("batch", first), ("kernel", second)):
        found = {"environment": {"device": "cpu: x86_64", **place}}
        write_result(tmp_path, 80.0, norm=norm, found=found, images_per_second=32.0)
    times = {standing["seconds_per_step"] for standing in standings_of(tmp_path)}
    assert times == {1.0 if comparable else None}


def test_intervals_that_leave_out_seeds_give_the_number_of_pairs(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 60.0), (2, 61.0), (3, 62.0)):
        write_result(tmp_path, accuracy, norm="batch", seed=seed)
        write_result(tmp_path, accuracy - 9, norm="none", seed=seed)
    for seed, accuracy in ((1, 71.0), (2, 72.2)):
        write_result(tmp_path, accuracy, norm="kernel", seed=seed)
    write_run(tmp_path, [], norm="kernel", seed=3, failure=("diverged", "nan"))
    standings_of(tmp_path)
    assert row_of(tmp_path, "32", "1")[7] == "+9.83 to +12.37 (2 pairs)"


@pytest.mark.parametrize("norm", ["batch", "ws_group", "kernel"])
def test_bytes_are_those_of_the_runs_network_at_its_batch_size(tmp_path: Path, norm: str) -> None:
    options = {"model_options": {"width": 0.125}, "found": FOUND}
    write_result(tmp_path, 70.0, norm="none", **options)
    configs = [write_result(tmp_path, 80.0, norm=norm, batch_size=n, **options) for n in (4, 7)]
    state = torch.get_rng_state()
    measured = {s["batch_size"]: s["saved_bytes"] for s in standings_of(tmp_path) if s["rank"] == 1}
    assert torch.equal(torch.get_rng_state(), state)
    for config in configs:
        network = build_network(config, num_classes=2, in_channels=3)
        x = torch.rand(config.batch_size, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        expected = saved_bytes(network, x) / config.batch_size
        assert measured[config.batch_size] == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"found": {}},
        {"found": {**FOUND, "image_shape": ["?"]}},
        {"found": FOUND, "model_options": {"width": 0.125, "wings": 2}},
        {"found": FOUND, "private": Privacy()},
    ],
    ids=["no shape", "damaged shape", "unknown option", "private"],
)
def test_bytes_that_cannot_be_measured_are_a_dash(tmp_path: Path, options: dict[str, Any]) -> None:
    for norm in ("group", "kernel"):
        write_result(tmp_path, 80.0, norm=norm, **options)
    assert [standing["saved_bytes"] for standing in standings_of(tmp_path)] == [None, None]
    assert row_of(tmp_path, "32", "1")[10] == "-"
