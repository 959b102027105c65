"""A comparison trains what is missing, and shows what the runs' folders hold."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from kernelnorm.cli import main
from kernelnorm.experiments.compare import Row, _draw, compare
from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.plotting import plain_log
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.style import LABELS, line_style, network_label
from kernelnorm.experiments.trainer import train
from kernelnorm.norms import NORMS, describe
from tests.small_runs import on, photos


def small(norm: str, batch_size: int) -> RunConfig:
    choices = {"epochs": 2, "subset": 50, "image_size": 8}
    return configure(recipe_for("digits-vgg8"), norm=norm, batch_size=batch_size, **choices)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    options = ["--epochs=2", "--subset=50", "--image-size=8", f"--out={folder}"]
    main(["compare", "digits-vgg8", "--norms=batch, kernel", "--batch-sizes=10,25", *options])
    return folder


def test_table_and_picture_come_out(out: Path) -> None:
    table = (out / "comparison.md").read_text()
    assert table.count("| BatchNorm |") == table.count("| KernelNorm |") == 2
    with Image.open(out / "comparison.png") as picture:
        assert picture.width > 1000
    records = json.loads((out / "comparison.json").read_text())
    assert [record["run"]["batch_size"] for record in records] == [10, 10, 25, 25]
    assert all((out / record["folder"] / "last.ckpt").exists() for record in records)


def test_rows_are_in_the_order_of_the_groups(out: Path) -> None:
    options = ["--epochs=2", "--subset=50", "--image-size=8", f"--out={out}"]
    main(["compare", "digits-vgg8", "--norms=kernel,batch", "--batch-sizes=10,25", *options])
    lines = (out / "comparison.md").read_text().splitlines()
    starts = [line.split(" | ")[:3] for line in lines if line.startswith(("| Batch", "| Kernel"))]
    batch, kernel = ["| BatchNorm", "batch-dependent"], ["| KernelNorm", "batch-independent"]
    assert starts == [[*row, size] for size in ("10", "25") for row in (batch, kernel)]
    groups = [record["group"] for record in json.loads((out / "comparison.json").read_text())]
    assert groups == ["batch-dependent", "batch-independent"] * 2


def test_again_it_trains_nothing_and_shows_the_same(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/*")}
    table = (out / "comparison.md").read_text()
    configs = [small(norm, size) for size in (10, 25) for norm in ("batch", "kernel")]
    compare(configs, out)
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/*")} == before
    assert (out / "comparison.md").read_text() == table
    assert f"Picture: {out / 'comparison.png'}" in capsys.readouterr().out


def test_it_goes_on_with_an_unfinished_run(tmp_path: Path) -> None:
    config = small("group", 10)
    train(config, Launch(out=tmp_path / config.name, max_steps=3, verbose=False))
    (row,) = compare([config], tmp_path)
    assert [metrics["epoch"] for metrics in row.history] == [1, 2]


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(out: Path) -> None:
    config = small("kernel", 10)
    folder = RunFolder(out / config.name)
    before = folder.read_metrics()
    for file in folder.path.glob("*.ckpt"):
        file.unlink()
    (row,) = compare([config], out)
    assert row.history == folder.read_metrics() == before
    assert not [*folder.path.glob("*.ckpt")]


def test_a_run_that_another_process_trains_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("batch", 10)
    folder = RunFolder(tmp_path / config.name)
    with ExitStack() as other:
        other.enter_context(folder.lock())
        monkeypatch.setattr("time.sleep", lambda seconds: seconds == 1 and other.close())
        (row,) = compare([config], tmp_path)
    assert (row.failure, len(row.history)) == ("", 2)
    assert f"waiting: another process trains in {folder.path}" in capsys.readouterr().out


def test_a_finished_run_of_other_images_is_refused(tmp_path: Path) -> None:
    for place, label in (("one", "cat"), ("two", "bird")):
        photos(tmp_path / place / "photos", label=label)
    first, second = (on(tmp_path / place / "photos") for place in ("one", "two"))
    out = tmp_path / "runs"
    compare([first], out)
    table = (out / "comparison.md").read_text()
    (out / second.name / "last.ckpt").unlink()
    with pytest.raises(RunError, match=r"the data of .* has changed: classes was .*'cat'"):
        compare([second], out)
    assert (out / "comparison.md").read_text() == table


def test_a_comparison_trains_whole_runs(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="a comparison trains whole runs: leave out max_steps"):
        compare([], tmp_path, Launch(max_steps=1))


def test_a_run_that_diverges_is_a_row_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compare([replace(small("none", 10), lr=1e8), small("batch", 10)], tmp_path)
    assert "training has diverged" in rows[0].failure
    lines = capsys.readouterr().out.splitlines()
    assert "failed" in lines[1]
    assert "training has diverged" in lines[2]
    assert rows[1].history == RunFolder(tmp_path / small("batch", 10).name).read_metrics()
    records = json.loads((tmp_path / "comparison.json").read_text())
    assert records[0]["final_accuracy"] is None


def test_a_run_that_cannot_be_trained_is_a_row_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [small("instance", 10), small("batch", 10)]  # the last maps are of 1 x 1
    rows = compare(configs, tmp_path)
    assert [bool(row.failure) for row in rows] == [True, False]
    table = (tmp_path / "comparison.md").read_text()
    assert "- InstanceNorm, batch size 10: vgg8 with norm instance cannot train on" in table
    monkeypatch.setattr("kernelnorm.experiments.compare.is_torchelastic_launched", lambda: True)
    with pytest.raises(RunError, match="vgg8 with norm instance cannot train on"):
        compare(configs, tmp_path)


def test_what_has_ended_is_written_down_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_kernel(config: RunConfig, launch: Launch, on_epoch: Any) -> RunFolder:
        if config.norm == "kernel":
            raise KeyboardInterrupt
        return train(config, launch)

    monkeypatch.setattr("kernelnorm.experiments.compare.train", stop_at_kernel)
    with pytest.raises(KeyboardInterrupt):
        compare([small("batch", 10), small("kernel", 10)], tmp_path)
    table = (tmp_path / "comparison.md").read_text()
    assert table.count("| BatchNorm |") == 1
    assert "KernelNorm" not in table
    assert len(json.loads((tmp_path / "comparison.json").read_text())) == 1


def test_final_accuracy_is_never_the_best_one() -> None:
    epoch = {"train_loss": 0.5, "seconds": 2.0}
    history = [{**epoch, "test_accuracy": a} for a in (0.99, 0.5, 0.5, 0.5, 0.5, 0.6)]
    cells = Row(replace(small("batch", 10), lr=0.005), history).cells()
    assert cells == ("BatchNorm", "10", "0.005", "6", "0.5000", "52.00%", "2.00")


def test_a_bar_counts_the_epochs_of_all_runs(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar(tqdm):
        seen: ClassVar[list[tuple[str, float, float]]] = []

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            self.seen.append((self.desc, self.n, self.total))
            return None

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            self.desc = desc or ""

    monkeypatch.setattr("kernelnorm.experiments.compare.tqdm", Bar)
    unfinished = small("group", 10)
    train(unfinished, Launch(out=tmp_path / unfinished.name, max_steps=7, verbose=False))
    assert len(RunFolder(tmp_path / unfinished.name).read_metrics()) == 1
    compare([unfinished, replace(small("none", 10), lr=1e8), small("batch", 10)], tmp_path)
    counted = [seen for i, seen in enumerate(Bar.seen) if seen not in Bar.seen[:i]]
    assert counted == [
        ("run 1 of 3", 2, 6),
        ("run 2 of 3", 4, 6),  # the one that diverges
        ("run 3 of 3", 5, 6),
        ("run 3 of 3", 6, 6),
    ]


def test_the_picture_shows_the_mean_of_the_last_five_epochs_over_those_epochs() -> None:
    accuracies = (0.9, 0.1, 0.5, 0.5, 0.5, 0.5, 0.6)
    history = [
        {"epoch": float(epoch), "train_loss": 2 / epoch, "test_accuracy": accuracy, "seconds": 1.0}
        for epoch, accuracy in enumerate(accuracies, 1)
    ]
    loss, accuracy = _draw([Row(small("batch", 10), history)]).axes
    (dashed,) = (line for line in accuracy.get_lines() if line.get_linestyle() == "--")
    assert [*dashed.get_xdata()] == [2.7, 7.3]
    assert [*dashed.get_ydata()] == [pytest.approx(52.0)] * 2
    assert "dashed: mean of the last five epochs" in accuracy.get_ylabel()
    assert loss.get_yscale() == "log"


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.3, 2.4, ["0.5", "1", "2"]),
        (1.1, 1.4, ["1.1", "1.2", "1.3", "1.4"]),
        (0.0005, 0.05, ["0.001", "0.003", "0.01", "0.03"]),
        (0.00001, 0.2, ["0.00001", "0.0001", "0.001", "0.01", "0.1"]),
    ],
)
def test_log_axes_have_plain_decimals(low: float, high: float, labels: list[str]) -> None:
    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.plot([low, high])
    plain_log(axes.yaxis)
    bottom, top = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert [label.get_text() for tick, label in ticks if bottom <= tick <= top] == labels


def test_networks_have_names_for_people() -> None:
    names = [network_label(name) for name in ("vgg8", "resnet50", "densenet121", "other3")]
    assert names == ["VGG8", "ResNet-50", "DenseNet-121", "other3"]
    names = [network_label(name) for name in ("efficientnet_b0", "mobilenet_v3_small")]
    assert names == ["EfficientNet-B0", "MobileNetV3-small"]


def test_every_norm_has_its_own_look() -> None:
    assert set(LABELS) == set(NORMS)
    groups = [describe(norm).group for norm in LABELS]
    assert groups == sorted(groups)
    assert len({line_style(norm)["color"] for norm in NORMS}) == len(NORMS)
    assert len({line_style(norm)["marker"] for norm in NORMS}) == len(NORMS)
