"""The report's numbers are those that can be worked out by hand from the run folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernelnorm.experiments.config import configure
from kernelnorm.experiments.recipes import RECIPES
from kernelnorm.experiments.report import report
from kernelnorm.experiments.runs import RunFolder
from tests.run_folders import cell_of, numbers_of, row_of, write_result, write_run

pytestmark = pytest.mark.usefixtures("undrawn")


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
    write_result(tmp_path, 90.0, lr=0.1, seed=1)  # not of the rate that was chosen
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


def test_a_rate_at_which_seed_0_diverged_is_never_the_best(tmp_path: Path) -> None:
    write_run(tmp_path, [], lr=0.1, seed=0, failure=("diverged", "nan"))
    write_result(tmp_path, 90.0, lr=0.1, seed=1)
    for seed, accuracy in ((0, 85.0), (1, 86.0), (2, 86.0), (3, 86.0)):
        write_result(tmp_path, accuracy, lr=0.05, seed=seed)
    cell = cell_of(numbers_of(tmp_path), "kernel", 32)
    assert (cell["lr"], sorted(cell["accuracies"])) == (0.05, ["1", "2", "3"])
    assert [rate["tuning"] for rate in cell["rates"]] == [pytest.approx(85.0), None]
    assert "mean over all seeds chooses" not in (tmp_path / "report" / "report.md").read_text()


def test_without_seed_0_a_rate_at_which_a_seed_diverged_is_not_the_best(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_result(tmp_path, 84.0, lr=0.05, seed=seed)
    write_result(tmp_path, 85.0, lr=0.1, seed=1)
    write_run(tmp_path, [], lr=0.1, seed=2, failure=("diverged", "nan"))
    assert cell_of(numbers_of(tmp_path), "kernel", 32)["lr"] == 0.05
    text = (tmp_path / "report" / "report.md").read_text()
    said = "accuracy is too high on average: KernelNorm at batch size 32."
    for table in ("Table 1.", "Table 4."):
        assert said in text.split(f"### {table}")[1].split("###")[0]


def test_a_run_diverged_at_each_rate(tmp_path: Path) -> None:
    for lr in (0.1, 0.05):
        write_run(tmp_path, [], lr=lr, seed=0, failure=("diverged", "nan"))
    write_result(tmp_path, 85.0, lr=0.05, seed=1)
    cell = cell_of(numbers_of(tmp_path), "kernel", 32)
    assert (cell["lr"], cell["accuracy"]) == (None, None)
    assert cell["absence"] == "diverged at all 2 learning rates"


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
    write_run(tmp_path, [], lr=1e30, seed=0, failure=("diverged", "nan"))
    text = report(tmp_path).with_suffix(".md").read_text()
    assert "| 32 | 0.05 (the lowest tried)<br>paper 0.025 |" in text
    assert "a rate beyond it may be better" in text
    assert row_of(text, "32", "KernelNorm", "0.05")[3:] == ["85.00", "85.00", "1 done", "best"]
    for rate in ("0.2", "1e+30"):
        assert row_of(text, "32", "KernelNorm", rate)[3:] == ["-", "-", "1 diverged", ""]


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
