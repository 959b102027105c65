"""The report's numbers are those that can be worked out by hand from the run folders."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from kernelnorm.experiments.config import configure
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.plotting import curves, legend, png, same_span
from kernelnorm.experiments.recipes import RECIPES
from kernelnorm.experiments.report import figures, report
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.style import line_style
from kernelnorm.norms import NORMS
from tests.run_folders import write_result, write_run


@pytest.fixture
def drawn() -> None:
    """For tests of what figures look like."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere figures are put together but not drawn, which takes most of a report's time."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(figures, "png", lambda _: b"a picture")


def numbers_of(root: Path) -> dict[str, Any]:
    """The numbers of the report, read again."""
    page = report(root)
    numbers: dict[str, Any] = json.loads(page.with_name("report.json").read_text())
    return numbers


def cell_of(numbers: dict[str, Any], norm: str, batch_size: int) -> dict[str, Any]:
    (section,) = numbers["sections"]
    (cell,) = (c for c in section["cells"] if (c["norm"], c["batch_size"]) == (norm, batch_size))
    return dict(cell)


def row_of(text: str, *starts: str) -> list[str]:
    """The cells of the first row of a Markdown table that begins with these cells."""
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return next(row for row in rows if row[: len(starts)] == [*starts])


def test_accuracy_is_mean_and_sample_deviation_of_the_last_five_epochs(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 80.0), (2, 82.0), (3, 87.0)):
        write_result(tmp_path, accuracy, seed=seed)
    cell = cell_of(numbers_of(tmp_path), "kernel", 32)
    # (80 + 82 + 87) / 3 = 83; the deviations -3, -1, 4 have squares 26, 26 / 2 = 13.
    assert cell["accuracy"] == {
        "mean": pytest.approx(83.0),
        "deviation": pytest.approx(13**0.5),
        "runs": 3,
    }
    assert (
        "83.00 ± 3.61<br>paper 85.51 ± 0.11 (−2.51)"
        in (tmp_path / "report" / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("seeds", "text"), [((1,), "80.00 (1 run)"), ((1, 2), "80.00 ± 0.00 (2 runs)")]
)
def test_fewer_than_three_seeds_are_said(tmp_path: Path, seeds: tuple[int, ...], text: str) -> None:
    for seed in seeds:
        write_result(tmp_path, 80.0, seed=seed)
    assert row_of(report(tmp_path).with_suffix(".md").read_text(), "32")[1].startswith(text)


def test_seed_0_chooses_the_rate_and_the_others_count(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0, lr=0.1, seed=0)
    write_result(tmp_path, 85.0, lr=0.05, seed=0)
    write_result(tmp_path, 99.0, lr=0.1, seed=1)  # not of the rate that was chosen
    for seed, accuracy in ((1, 70.0), (2, 72.0), (3, 74.0)):
        write_result(tmp_path, accuracy, lr=0.05, seed=seed)
    cell = cell_of(numbers_of(tmp_path), "kernel", 32)
    assert cell["lr"] == 0.05
    assert sorted(cell["accuracies"]) == ["1", "2", "3"]
    assert cell["accuracy"]["mean"] == pytest.approx(72.0)
    tried = [(rate["lr"], rate["tuning"], rate["states"]) for rate in cell["rates"]]
    assert tried == [
        (0.05, pytest.approx(85.0), {"done": 4}),
        (0.1, pytest.approx(80.0), {"done": 2}),
    ]


def test_seed_0_counts_where_it_is_alone(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0, lr=0.1, seed=0)
    write_result(tmp_path, 85.0, lr=0.05, seed=0)
    write_run(tmp_path, [50.0, 60.0], lr=0.05, seed=1)  # unfinished
    cell = cell_of(numbers_of(tmp_path), "kernel", 32)
    assert (cell["accuracies"], cell["lr"]) == ({"0": pytest.approx(85.0)}, 0.05)


def test_all_seeds_count_where_a_single_rate_was_tried(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 80.0), (1, 82.0)):
        write_result(tmp_path, accuracy, seed=seed)
    assert cell_of(numbers_of(tmp_path), "kernel", 32)["accuracy"]["mean"] == pytest.approx(81.0)


def test_without_seed_0_the_best_mean_chooses(tmp_path: Path) -> None:
    for lr, accuracies in ((0.1, (80.0, 90.0)), (0.05, (84.0, 84.0))):
        for seed, accuracy in enumerate(accuracies, 1):
            write_result(tmp_path, accuracy, lr=lr, seed=seed)
    assert cell_of(numbers_of(tmp_path), "kernel", 32)["lr"] == 0.1


def test_runs_that_are_not_done_are_listed_and_in_no_mean(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0, seed=1)
    write_run(tmp_path, [10.0], seed=2, failure=("diverged", "the loss is nan"))
    write_run(tmp_path, [11.0], seed=3, failure=("failed", "No space | left\non device"))
    write_run(tmp_path, [12.0, 13.0], seed=4)
    numbers = numbers_of(tmp_path)
    (section,) = numbers["sections"]
    assert section["counts"] == {
        "done": 1,
        "diverged": 1,
        "failed": 1,
        "running": 0,
        "unfinished": 1,
        "missing": 0,
    }
    text = (tmp_path / "report" / "report.md").read_text()
    assert "80.00 (1 run, 1 diverged)" in text
    assert "Runs: 1 done, 1 diverged, 1 failed, 1 unfinished." in text
    assert "the loss is nan" in text
    assert "No space \\| left on device" in text
    assert "2 of at most 6 epochs" in text
    states = {run["seed"]: (run["state"], run["final_accuracy"]) for run in section["runs"]}
    assert states == {
        1: ("done", pytest.approx(80.0)),
        2: ("diverged", None),
        3: ("failed", None),
        4: ("unfinished", None),
    }


def test_a_run_that_is_being_trained_is_running(tmp_path: Path) -> None:
    config = write_run(tmp_path, [10.0], lr=0.1)
    write_run(tmp_path, [], lr=0.2, failure=("failed", "no space"))
    with RunFolder(tmp_path / config.name).lock():
        (section,) = numbers_of(tmp_path)["sections"]
    assert section["counts"]["running"] == 1
    assert section["cells"][0]["absence"] == "running"


def test_a_failure_names_no_path_of_the_machine_above_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, [], failure=("failed", f"cannot write {tmp_path}/run/last.ckpt"))
    monkeypatch.chdir(tmp_path.parent)
    numbers = numbers_of(Path(tmp_path.name))
    assert numbers["sections"][0]["runs"][0]["message"] == "cannot write run/last.ckpt"


def test_a_strange_file_beside_the_runs_hides_none(tmp_path: Path) -> None:
    write_result(tmp_path / "sweep", 80.0)
    (tmp_path / "config.yaml").write_text("case: cifar10-vgg8\n")
    numbers = numbers_of(tmp_path)
    assert numbers["sections"][0]["counts"]["done"] == 1
    assert [item["folder"] for item in numbers["unreadable"]] == ["."]


def test_sections_have_names_and_pictures_of_their_own(tmp_path: Path) -> None:
    for case in ("photos (old)", "photos _old_"):
        for subset in (500, 600):
            folder = tmp_path / f"{case}-{subset}"
            config = write_result(folder, 80.0, subset=subset)
            file = folder / config.name / "config.yaml"
            file.write_text(file.read_text().replace("case: cifar10-vgg8", f"case: {case}"))
    page = report(tmp_path)
    titles = re.findall(r"^## (.*)", page.with_suffix(".md").read_text(), re.MULTILINE)
    assert len({*titles}) == 4
    assert len([*page.parent.glob("*-figure-4.png")]) == 4


def test_cells_say_why_they_are_empty(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0, norm="batch", batch_size=2)
    write_run(tmp_path, [], norm="kernel", batch_size=2, lr=0.1, failure=("diverged", "nan"))
    write_run(tmp_path, [], norm="kernel", batch_size=2, lr=0.2, failure=("diverged", "nan"))
    write_run(tmp_path, [10.0], norm="kernel", batch_size=32)
    write_run(tmp_path, [], norm="group", batch_size=2, failure=("failed", "no space"))
    numbers = numbers_of(tmp_path)
    absent = {(c["norm"], c["batch_size"]): c["absence"] for c in numbers["sections"][0]["cells"]}
    assert absent == {
        ("batch", 2): "",
        ("batch", 32): "no run",
        ("group", 2): "failed",
        ("group", 32): "no run",
        ("kernel", 2): "diverged at all 2 learning rates",
        ("kernel", 32): "unfinished",
    }
    text = (tmp_path / "report" / "report.md").read_text()
    assert numbers["sections"][0]["counts"]["missing"] == 2
    assert row_of(text, "BatchNorm", "32") == ["BatchNorm", "32"]  # of the table of the missing


def test_a_run_that_converged_early_is_done(tmp_path: Path) -> None:
    config = write_run(tmp_path, [], epochs=80)
    folder = RunFolder(tmp_path / config.name)
    line = {"train_loss": 1e-4, "test_accuracy": 0.5, "seconds": 1.0}
    folder.write_metrics([{"epoch": float(epoch), **line} for epoch in range(1, 6)])
    assert cell_of(numbers_of(tmp_path), "kernel", 32)["accuracy"]["mean"] == 50.0


def test_kernel_and_batch_are_compared_by_common_seeds(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 81.0), (2, 83.0), (3, 88.0), (5, 10.0)):
        write_result(tmp_path, accuracy, norm="kernel", seed=seed)
    for seed, accuracy in ((1, 80.0), (2, 81.0), (3, 85.0), (4, 99.0)):
        write_result(tmp_path, accuracy, norm="batch", seed=seed)
    (comparison,) = numbers_of(tmp_path)["sections"][0]["comparisons"]
    # The differences 1, 2 and 3: mean 2, deviation 1; t(0.975, 2) = 4.30265.
    half = 4.3026527 / 3**0.5
    assert comparison["difference"] == {
        "mean": pytest.approx(2.0),
        "interval": [pytest.approx(2 - half), pytest.approx(2 + half)],
        "pairs": 3,
    }
    assert comparison["paper"] == pytest.approx(85.51 - 84.92)


def test_one_pair_has_no_interval(tmp_path: Path) -> None:
    write_result(tmp_path, 81.0, norm="kernel")
    write_result(tmp_path, 80.0, norm="batch")
    text = report(tmp_path).with_suffix(".md").read_text()
    assert row_of(text, "32", "+1.00")[2] == "fewer than two pairs: no interval"


def test_times_are_medians_and_ratios_to_batch_normalisation(tmp_path: Path) -> None:
    for seed, seconds in ((1, 2.0), (2, 3.0), (3, 9.0)):
        write_result(tmp_path, 80.0, norm="kernel", seed=seed, seconds=seconds)
    write_result(tmp_path, 80.0, norm="batch", seconds=2.0)
    kernel = cell_of(numbers_of(tmp_path), "kernel", 32)
    assert (kernel["seconds_per_epoch"], kernel["minutes"]) == (3.0, pytest.approx(6 * 3 / 60))
    text = (tmp_path / "report" / "report.md").read_text()
    # The paper's Table 2: 12.41 s to 8.42 s, 4.55 min to 6.03 min.
    ratios = ["3.00", "1.50", "1.47", "0.30", "1.50", "0.75"]
    assert row_of(text, "32", "KernelNorm", "3.00") == ["32", "KernelNorm", *ratios]


def test_best_rates_stand_beside_the_papers(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0, lr=0.1, seed=0)
    write_result(tmp_path, 85.0, lr=0.05, seed=0)
    write_run(tmp_path, [], lr=0.2, seed=0, failure=("diverged", "nan"))
    text = report(tmp_path).with_suffix(".md").read_text()
    assert "| 32 | 0.05 (the lowest tried)<br>paper 0.025 |" in text
    assert "one beyond it may be better" in text
    assert row_of(text, "32", "KernelNorm", "0.05")[3:] == ["85.00", "85.00", "1 done", "best"]
    assert row_of(text, "32", "KernelNorm", "0.2")[3:] == ["-", "-", "1 diverged", ""]


def test_what_is_not_as_in_the_paper_is_said_first(tmp_path: Path) -> None:
    images = {"train_images": 2500, "test_images": 2500}
    write_result(tmp_path, 50.0, subset=2500, model_options={"width": 0.5}, found=images)
    text = report(tmp_path).with_suffix(".md").read_text()
    differs = (
        "Not trained as for the paper's tables: 2,500 of 50,000 training images, "
        "2,500 of 10,000 test images, 6 epochs in place of 80, "
        "width 0.5"
    )
    assert differs in text
    assert text.index(differs) < text.index("Table 1")


def test_at_the_papers_scale_nothing_warns(tmp_path: Path) -> None:
    images = {"train_images": 50_000, "test_images": 10_000}
    write_run(tmp_path, [80.0] * 80, epochs=80, found=images)
    assert numbers_of(tmp_path)["sections"][0]["deviations"] == []
    assert "Not trained as for" not in (tmp_path / "report" / "report.md").read_text()


def test_every_case_and_every_way_of_training_has_its_section(tmp_path: Path) -> None:
    write_result(tmp_path / "a", 80.0, case="imagewoof-resnet18")
    write_result(tmp_path / "b" / "c", 70.0, case="cifar10-vgg8")
    write_result(tmp_path / "b" / "d", 60.0, case="cifar10-vgg8", subset=100)
    write_result(tmp_path / "e", 60.0, case="imagenette-densenet121")
    numbers = numbers_of(tmp_path)
    cases = [section["case"] for section in numbers["sections"]]
    assert cases == ["cifar10-vgg8"] * 2 + ["imagenette-densenet121", "imagewoof-resnet18"]
    assert [len(section["runs"]) for section in numbers["sections"]] == [1, 1, 1, 1]
    assert "## cifar10-vgg8 (2)" in (tmp_path / "report" / "report.md").read_text()


def test_a_dataset_of_ones_own_has_no_columns_of_the_paper(tmp_path: Path) -> None:
    for norm in ("batch", "kernel"):
        for seed in (1, 2):
            config = write_result(tmp_path, 80.0, norm=norm, case="digits-vgg8", seed=seed)
    text = report(tmp_path).with_suffix(".md").read_text()
    assert config.case == "digits-vgg8"
    assert "| 32 | 80.00 ± 0.00 (2 runs) | 80.00 ± 0.00 (2 runs) |" in text
    assert "there are no values to compare with" in text
    assert "paper's ratio" not in text
    assert "paper's difference" not in text


def test_variants_are_compared_with_the_papers_rules_and_are_in_no_other_table(
    tmp_path: Path,
) -> None:
    for seed, plain, without in ((1, 80.0, 79.0), (2, 82.0, 79.0)):
        write_result(tmp_path, plain, seed=seed)
        options = {"rules": {"dropout_p": 0.0}}
        write_result(tmp_path, without, seed=seed, model_options=options)
    (section,) = numbers_of(tmp_path)["sections"]
    (cell,) = section["cells"]
    assert cell["accuracy"]["mean"] == pytest.approx(81.0)
    paper_rules, variant = section["variants"]
    assert (paper_rules["name"], variant["name"]) == ("", "dropout_p=0")
    assert variant["accuracy"]["mean"] == pytest.approx(79.0)
    # The differences -1 and -3: mean -2, deviation the root of 2; t(0.975, 1) = 12.7062.
    assert variant["to_paper"]["mean"] == pytest.approx(-2.0)
    assert variant["to_paper"]["interval"] == [
        pytest.approx(-2 - 12.706205),
        pytest.approx(-2 + 12.706205),
    ]
    assert (tmp_path / "report" / "cifar10-vgg8-figure-5.png").exists()


def test_a_variant_is_named_by_what_it_changes() -> None:
    rules = {"head": False, "dropout_p": 0.0, "residual_relu": "sum"}
    recipe, choices = RECIPES["imagewoof-resnet18"], {"norm": "kernel", "batch_size": 32}
    config = configure(recipe, **choices, model_options={"rules": rules})
    assert config.variant == "dropout_p=0, head=False, residual_relu=sum"
    assert configure(recipe, **choices, model_options={"rules": {}}).variant == ""
    assert configure(recipe, **choices).variant == ""


def test_folders_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0)
    damage = {
        "config": ("config.yaml", "run: ["),
        "binary": ("config.yaml", b"\xff\xfe\x00"),
        "section": ("config.yaml", "classes: []"),
        "metrics": ("metrics.jsonl", '{"epoch": 1, "train_lo'),
        "nan": ("metrics.jsonl", '{"train_loss": 1, "test_accuracy": NaN, "seconds": 1}'),
        "failure": ("failure.json", '{"kind": "tired"}'),
        "norm": ("config.yaml", None),
    }
    for name, (file, content) in damage.items():
        config = write_result(tmp_path / "damaged", 80.0, seed=7)
        folder = (tmp_path / "damaged" / config.name).rename(tmp_path / name)
        if content is None:
            text = (folder / file).read_text()
            content = text.replace("norm: kernel", "norm: strange")
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        if name == "failure":  # of a run that is done, a failure is old
            (folder / "metrics.jsonl").unlink()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").touch()
    numbers = numbers_of(tmp_path)
    reasons = {item["folder"]: item["reason"] for item in numbers["unreadable"]}
    assert set(reasons) == {*damage, "locked"}
    assert "unknown norm: 'strange'" in reasons["norm"]
    assert "line 1, must have numbers" in reasons["nan"]
    assert "no config.yaml" in reasons["locked"]
    assert str(tmp_path) not in json.dumps(numbers)
    assert len(numbers["sections"][0]["runs"]) == 1


def test_a_run_that_lies_there_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [10.0, 20.0])
    config = write_result(tmp_path / "b", 80.0)
    numbers = numbers_of(tmp_path)
    (run,) = numbers["sections"][0]["runs"]
    assert run["folder"] == f"b/{config.name}"
    (item,) = numbers["unreadable"]
    assert item == {"folder": f"a/{config.name}", "reason": f"the same run as b/{config.name}"}


def test_a_root_without_runs_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there are no runs under .*kernelnorm train, sweep"):
        report(tmp_path)
    with pytest.raises(RunError, match="is not a folder"):
        report(tmp_path / "nowhere")


def test_its_own_folder_is_not_read(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0)
    for out in (tmp_path / "report", tmp_path / "elsewhere"):
        write_result(out, 10.0, seed=9)
        report(tmp_path, out)
        numbers = json.loads((out / "report.json").read_text())
        assert [run["seed"] for run in numbers["sections"][0]["runs"]] == [1]


def test_training_that_the_paper_does_not_have_is_named(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0)
    assert "epochs; 32-true." in report(tmp_path).with_suffix(".md").read_text()
    options = {"optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 1.5}
    write_result(tmp_path, 80.0, **options, init_from="0123abcd")
    text = report(tmp_path).with_suffix(".md").read_text()
    named = ", AdamW, cosine schedule, 1.5 epochs of warm-up, from the weights 0123abcd; 32-true."
    assert named in text


def test_a_figure_says_which_norms_it_shows(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0, norm="batch", batch_size=2)
    write_result(tmp_path, 80.0, norm="kernel")
    text = report(tmp_path).with_suffix(".md").read_text()
    assert "per epoch at batch size 32, KernelNorm." in text
    assert "![Test accuracy against batch size, BatchNorm, KernelNorm;" in text


@pytest.mark.usefixtures("drawn")
def test_figures_are_pictures_and_the_markdown_shows_them(tmp_path: Path) -> None:
    for norm in ("batch", "kernel"):
        for batch_size in (2, 32):
            for lr in (0.01, 0.02):
                options = {"norm": norm, "batch_size": batch_size, "lr": lr, "seed": 0}
                write_result(tmp_path, 80.0 + batch_size / 8, **options)
    for p in (0.0, 0.2):
        write_result(tmp_path, 80.0, seed=0, model_options={"rules": {"dropout_p": p}})
    write_result(tmp_path, 80.0, seed=0, model_options={"rules": {"head": False}})
    page = report(tmp_path)
    text = page.with_suffix(".md").read_text()
    names = ("figure-3", "figure-4", "learning-rates", "figure-5", "ablations")
    assert {file.stem for file in page.parent.glob("*.png")} == {f"cifar10-vgg8-{n}" for n in names}
    for file in page.parent.glob("*.png"):
        assert f"]({file.name})" in text
        with Image.open(BytesIO(file.read_bytes())) as picture:
            assert picture.width > 700
            colors = picture.convert("RGB").getcolors(2**24)
            assert colors is not None
            assert len(colors) > 50  # lines are drawn


def test_curves_are_the_mean_of_the_seeds_with_a_band() -> None:
    axes = Figure().subplots()
    curves(axes, [[1.0, 2.0, 3.0], [3.0, 8.0]], line_style("batch"))
    (line,), (band,) = axes.get_lines(), axes.collections
    assert [*line.get_xdata()] == [1, 2]
    assert [*line.get_ydata()] == [2.0, 5.0]
    box = band.get_datalim(axes.transData)
    assert (box.y0, box.y1) == (1.0, 8.0)
    alone = Figure().subplots()
    curves(alone, [[1.0, 2.0]], line_style("batch"))
    assert not alone.collections


def test_axes_of_the_same_span() -> None:
    panels = Figure().subplots(1, 3)
    for panel, limits in zip(panels, ((20.0, 56.0), (83.0, 86.0), (40.0, 44.0)), strict=True):
        panel.set_ylim(*limits)
    same_span(panels)
    assert [panel.get_ylim() for panel in panels] == [(20, 56), (64, 100), (24, 60)]


@pytest.mark.parametrize("norms", [("batch", "group", "layer", "kernel"), NORMS])
def test_legends_are_within_their_figures(norms: tuple[str, ...]) -> None:
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for norm in norms:
        axes.plot([0, 1], [0, 1], **line_style(norm))
    legend(figure, [axes])
    png(figure)
    (drawn,) = figure.legends
    box = drawn.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_what_a_failure_says_is_shown_and_not_run(tmp_path: Path) -> None:
    message = '<script>alert("1")</script>'
    write_run(tmp_path, [], failure=("failed", message))
    page = report(tmp_path)
    assert "&lt;script&gt;alert(" in page.read_text()
    assert message not in page.read_text()
    assert "<script>" not in page.with_suffix(".md").read_text()


def test_the_page_names_nothing_outside_itself(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0)
    text = report(tmp_path).read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert 'src="data:image/png;base64,' in text
