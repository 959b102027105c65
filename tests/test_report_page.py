"""What the report says of its runs: states, damaged folders, deviations from the paper."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.report import report
from kernelnorm.experiments.runs import RunFolder
from tests.run_folders import numbers_of, row_of, write_result, write_run

pytestmark = pytest.mark.usefixtures("undrawn")


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


def test_folders_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    write_result(tmp_path, 80.0)
    damage = {
        "config": ("config.yaml", "run: ["),
        "binary": ("config.yaml", b"\xff\xfe\x00"),
        "alias": ("config.yaml", ("model_options: {}", "model_options: {a: &a [], b: *a}")),
        "section": ("config.yaml", "classes: []"),
        "metrics": ("metrics.jsonl", '{"epoch": 1, "train_lo'),
        "nan": ("metrics.jsonl", '{"train_loss": 1, "test_accuracy": NaN, "seconds": 1}'),
        "failure": ("failure.json", '{"kind": "tired"}'),
        "huge": ("metrics.jsonl", '{"train_loss": 1, "test_accuracy": 1e308, "seconds": 1}'),
        "budget": (
            "metrics.jsonl",
            '{"train_loss": 1, "test_accuracy": 0.5, "seconds": 1, "epsilon": NaN}',
        ),
        "norm": ("config.yaml", ("norm: kernel", "norm: strange")),
        "options": ("config.yaml", ("model_options: {", "model_options: [")),
        "case": ("config.yaml", ("case: cifar10-vgg8", "case: null")),
        "warmup": ("config.yaml", ("warmup_epochs: 0.0", "warmup_epochs: x")),
        "date": ("config.yaml", ("model_options: {}", "model_options: {x: 2020-01-01}")),
        "keys": ("config.yaml", ("model_options: {}", "model_options: {rules: {1: 2, a: 3}}")),
        "batch": ("config.yaml", ("batch_size: 32", f"batch_size: {'9' * 400}")),
        "images": ("config.yaml", ("environment:", "train_images: abc\nenvironment:")),
        "still": ("metrics.jsonl", '{"train_loss": 1, "test_accuracy": 0.5, "seconds": 0.0}'),
    }
    for name, (file, content) in damage.items():
        config = write_result(tmp_path / "damaged", 80.0, seed=7)
        folder = (tmp_path / "damaged" / config.name).rename(tmp_path / name)
        if isinstance(content, tuple):
            text = (folder / file).read_text()
            assert content[0] in text
            content = text.replace(*content).replace("[}", "[]")
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
    assert "not of this version of kernelnorm: case is None" in reasons["case"]
    assert "no config.yaml" in reasons["locked"]
    assert "model_options cannot be read" in reasons["date"]
    assert "batch_size must be a positive number, got '9999999999" in reasons["batch"]
    assert "train_images must be a positive number, got 'abc'" in reasons["images"]
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


def test_a_link_to_a_run_is_read(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    write_result(root, 70.0, norm="batch")
    config = write_result(elsewhere, 80.0)
    (root / "linked").symlink_to(elsewhere / config.name)
    (root / "loop").symlink_to(root)
    runs = numbers_of(root)["sections"][0]["runs"]
    assert {run["norm"]: run["folder"] for run in runs}["kernel"] == "linked"


def of_images(train: str, test: str = "test") -> dict[str, dict[str, str]]:
    return {"found": {"train_fingerprint": train, "test_fingerprint": test}}


@pytest.mark.parametrize("images", [("a", "b"), ("b", "a"), ("b", "b")])
def test_runs_of_folders_with_other_images_have_sections_of_their_own(
    images: tuple[str, str], tmp_path: Path
) -> None:
    for place, found in (("a", of_images("a", "a")), ("b", of_images(*images))):
        write_result(tmp_path / place, 80.0, dataset="photos", **found)
    sections = numbers_of(tmp_path)["sections"]
    assert [len(section["runs"]) for section in sections] == [1, 1]
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"Data photos (fingerprints {', '.join(images)});" in text


def test_runs_of_the_same_images_at_two_paths_have_one_section(tmp_path: Path) -> None:
    for norm, dataset in (("batch", "photos"), ("kernel", "/home/me/photos")):
        write_result(tmp_path, 80.0, norm=norm, dataset=dataset, **of_images("a"))
    failed = {"failure": ("failed", "no space"), "dataset": "photos"}
    write_run(tmp_path, [], norm="group", **failed)  # before it had images
    (section,) = numbers_of(tmp_path)["sections"]
    assert section["counts"]["failed"] == 1
    assert [standing["norm"] for standing in section["leaderboard"]] == ["batch", "kernel", "group"]


def test_two_runs_that_differ_in_nothing_shown_are_an_error(tmp_path: Path) -> None:
    older = write_result(tmp_path / "a", 80.0, dataset="photos")  # without fingerprints
    write_result(tmp_path / "b", 70.0, dataset="photos", **of_images("a"))
    message = f"a/{older.name} and b/{older.name} have the same normalisation, batch size, learning"
    with pytest.raises(RunError, match=re.escape(message)):
        report(tmp_path)


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
