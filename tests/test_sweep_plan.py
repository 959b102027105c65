"""What a sweep wants follows from its options and from the results that are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.paper import paper
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.runs import Metrics, RunFolder
from kernelnorm.experiments.status import State, Status, read_status, seconds_left
from kernelnorm.experiments.sweep.grid import make_grid
from kernelnorm.experiments.sweep.plan import Grid, Plan, Tuned
from kernelnorm.experiments.sweep.reproduction import PAPER_NORMS, reproduction, scale_of
from kernelnorm.experiments.sweep.view import duration, forecast, table
from kernelnorm.experiments.tuning import best_rate, rates_to_try

RATES = [0.1, 0.05, 0.025, 0.01, 0.005, 0.0025, 0.001]


def grid(**options: Any) -> list[RunConfig]:
    given = {"norms": ["batch"], "batch_sizes": [8], **options}
    return make_grid(recipe_for("digits-vgg8"), **given)


def test_grid_has_each_run_once_and_large_batches_first() -> None:
    runs = grid(norms=["kernel", "batch", "kernel"], batch_sizes=[2, 32, 2], seeds=[0, 1, 0])
    cells = [(run.batch_size, run.norm, run.seed) for run in runs]
    norms = ("kernel", "batch")
    assert cells == [(b, norm, seed) for b in (32, 2) for norm in norms for seed in (0, 1)]
    assert runs == grid(norms=["kernel", "batch"], batch_sizes=[32, 2], seeds=[0, 1])


def test_grid_takes_the_papers_learning_rates_or_those_that_are_given() -> None:
    assert [run.lr for run in grid(batch_sizes=[2, 256])] == [0.05, 0.0025]
    assert [run.lr for run in grid(lrs=[0.3, 0.1])] == [0.3, 0.1]


def test_rules_are_variants_of_the_kernel_networks_alone() -> None:
    rules = [{"dropout_p": 0.0}, {}]
    runs = grid(norms=["kernel", "batch"], rules=rules)
    options = [(run.norm, run.model_options) for run in runs]
    assert options == [
        ("kernel", {"width": 0.25, "rules": {"dropout_p": 0.0}}),
        ("kernel", {"width": 0.25}),
        ("batch", {"width": 0.25}),
    ]
    assert runs[1:] == grid(norms=["kernel", "batch"])  # the paper's rules are no other run
    wide = grid(norms=["kernel"], rules=rules, model_options={"width": 1.0}, epochs=3)
    assert wide[0].model_options == {"width": 1.0, "rules": {"dropout_p": 0.0}}
    assert wide[0].epochs == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, r"no runs: one of its lists \(norms, .*, seeds\) is empty"),
        ({"batch_sizes": [0]}, "batch_size must be positive, got 0"),
        ({"lrs": [0.0]}, "learning rate must be positive"),
        ({"norms": ["weight"]}, "unknown norm 'weight'"),
        (
            {"norms": ["kernel"], "rules": [{"dropout": 0.1}]},
            r"unknown rule 'dropout'.*evaluation$",
        ),
        ({"norms": ["kernel"], "rules": [{"head": False}]}, "rule head=False does nothing"),
        ({"model_options": {"rules": 3}, "norms": ["kernel"]}, "rules must be a mapping"),
        ({"model_options": {"small_images": True}}, "cannot build vgg8: .*small_images"),
    ],
)
def test_impossible_grids_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        grid(**options)


def test_variants_keep_the_rules_of_the_model_options() -> None:
    options = {"rules": {"dropout_p": 0.0}}
    variants = [{}, {"evaluation": "plain"}]
    runs = grid(norms=["kernel"], batch_sizes=[8], rules=variants, model_options=options)
    assert [run.model_options["rules"] for run in runs] == [
        {"dropout_p": 0.0},
        {"dropout_p": 0.0, "evaluation": "plain"},
    ]


def search(results: dict[float, float], start: float, **options: Any) -> list[list[float]]:
    """The rates that are asked for, one answer after the other."""
    known: dict[float, float] = {}
    rounds = []
    while asked := rates_to_try(RATES, start, known, **options):
        rounds.append(asked)
        known |= {lr: results[lr] for lr in asked}
    return rounds


def peak_at(place: int) -> dict[float, float]:
    return {lr: 0.9 - 0.1 * abs(i - place) for i, lr in enumerate(RATES)}


def test_a_peak_that_is_expected_takes_three_runs() -> None:
    assert search(peak_at(2), 0.025) == [[0.05, 0.025, 0.01]]


def test_the_search_goes_uphill_and_no_further_than_the_peak() -> None:
    assert search(peak_at(4), 0.05) == [[0.1, 0.05, 0.025], [0.01], [0.005], [0.0025]]
    assert search(peak_at(1), 0.005) == [[0.01, 0.005, 0.0025], [0.025], [0.05], [0.1]]


@pytest.mark.parametrize("start", [0.05, 0.1, 7.0])
def test_a_peak_at_the_end_of_the_list_is_one(start: float) -> None:
    first = RATES[:3] if start == 0.05 else RATES[:2]
    assert search(peak_at(0), start) == [first]
    assert search(peak_at(6), 0.001) == [[0.0025, 0.001]]


def test_a_start_that_is_not_in_the_list_is_the_nearest_in_ratio() -> None:
    assert rates_to_try(RATES, 0.07, {}) == [0.1, 0.05, 0.025]
    assert rates_to_try(RATES, 0.0034, {}) == [0.005, 0.0025, 0.001]


def test_a_diverged_rate_is_worse_than_any() -> None:
    diverging = {**peak_at(0), 0.1: -math.inf, 0.05: -math.inf}
    assert search(diverging, 0.05) == [[0.1, 0.05, 0.025], [0.01]]
    assert best_rate({0.1: -math.inf, 0.05: 0.1}) == 0.05


def test_where_all_rates_diverge_it_goes_down_to_the_last() -> None:
    nothing = dict.fromkeys(RATES, -math.inf)
    assert search(nothing, 0.05) == [[0.1, 0.05, 0.025], [0.01], [0.005], [0.0025], [0.001]]
    assert best_rate(nothing) is None


def test_where_nothing_is_learned_it_looks_on_both_sides() -> None:
    chance = {**dict.fromkeys(RATES, 0.1), 0.1: 0.4}
    assert search(chance, 0.005) == [[0.01, 0.005, 0.0025], [0.025, 0.001], [0.05], [0.1]]
    assert search(dict.fromkeys(RATES, 0.1), 0.01) == [
        [0.025, 0.01, 0.005],
        [0.05, 0.0025],
        [0.1, 0.001],
    ]


def test_a_difference_of_rounding_is_none() -> None:
    assert 0.1 + 0.2 > 0.3
    assert best_rate({0.05: 0.1 + 0.2, 0.01: 0.3}) == 0.01


def test_all_rates_are_all_rates() -> None:
    assert search(peak_at(2), 0.025, every=True) == [RATES]


def test_of_equal_rates_the_lowest_is_the_best() -> None:
    assert best_rate({0.01: 0.5, 0.1: 0.5, 0.05: 0.4}) == 0.01


def test_the_search_asks_for_nothing_that_is_known() -> None:
    assert rates_to_try(RATES, 0.025, {0.05: 0.5}) == [0.025, 0.01]
    known = {lr: peak_at(5)[lr] for lr in (0.05, 0.025, 0.01, 0.0025)}  # 0.0025 by someone else
    assert rates_to_try(RATES, 0.025, known) == [0.005, 0.001]


def finished_by(plan: Plan, accuracies: dict[float, float]) -> list[RunConfig]:
    """All runs of a plan, its results being those of the learning rates."""
    known: dict[str, float] = {}

    def result(config: RunConfig) -> float | None:
        return known.get(config.name)

    while True:
        runs = plan.runs(result)
        least, most = plan.extent(result)
        assert len(runs) <= least <= most
        if all(run.name in known for run in runs):
            assert len(runs) == least == most
            return runs
        known.update({run.name: accuracies[run.lr] for run in runs})


def tuned(**options: Any) -> Tuned:
    return Tuned(grid(norms=["batch", "kernel"]), RATES, **options)


def test_the_protocol_repeats_the_best_rate_with_other_seeds() -> None:
    for norm in ("batch", "kernel"):  # both are expected at other rates, and go to this one
        runs = [run for run in finished_by(tuned(), peak_at(3)) if run.norm == norm]
        assert [run.seed for run in runs if run.lr == 0.01] == [0, 1, 2, 3]
        assert all(run.seed == 0 for run in runs if run.lr != 0.01)
        assert {0.025, 0.01, 0.005} <= {run.lr for run in runs} < {*RATES}


def test_the_protocol_repeats_nothing_where_all_diverges() -> None:
    runs = finished_by(tuned(), dict.fromkeys(RATES, -math.inf))
    assert {run.seed for run in runs} == {0}


def test_the_protocol_with_all_rates() -> None:
    assert len(finished_by(tuned(every=True, seeds=(5,)), peak_at(3))) == 2 * (len(RATES) + 1)


def test_a_run_that_fails_holds_up_its_own_norm_alone() -> None:
    plan = tuned()

    def result(config: RunConfig) -> float | None:
        return None if config.norm == "kernel" else peak_at(4)[config.lr]

    repeated = {run.norm for run in plan.runs(result) if run.seed}
    assert repeated == {"batch"}


def test_a_plain_grid_wants_all_at_once() -> None:
    plan = Grid(grid(seeds=[0, 1]))
    assert plan.runs(lambda _: None) == grid(seeds=[0, 1])
    assert plan.extent(lambda _: None) == (2, 2)


def test_reproduction_at_the_papers_scale_is_the_papers() -> None:
    for case in paper():
        plan = reproduction(case, "paper")
        table = paper()[case]["learning_rate"]
        assert plan.note == ""
        assert {(run.norm, run.batch_size): run.lr for run in plan.cells} == {
            (norm, row["batch_size"]): row[norm] for row in table["rows"] for norm in PAPER_NORMS
        }
        assert all(run.epochs == 80 and run.subset is None for run in plan.cells)
        assert (plan.rates, plan.seeds) == (table["tried"], (1, 2, 3))


@pytest.mark.parametrize("case", ["digits-vgg8", *paper()])
def test_reproduction_at_the_small_scale_says_so(case: str) -> None:
    plan = reproduction(case, "small")
    assert plan.note.startswith("Scale small (subset ")
    assert {run.batch_size for run in plan.cells} == {*scale_of(case, "small").batch_sizes}
    assert {run.lr for run in plan.cells} <= {*plan.rates}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("mnist", "small"), {}, "unknown case 'mnist'"),
        (("digits-vgg8", "paper"), {}, "digits-vgg8 is not in the paper: take --scale small"),
        (("digits-vgg8", "small"), {"seeds": [0, 1]}, "seed 0 is the seed of the tuning"),
    ],
)
def test_impossible_reproductions_are_errors(
    arguments: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        reproduction(*arguments, **options)


def history(epochs: int, seconds: float = 1.0, accuracy: float = 0.5) -> list[Metrics]:
    metrics = {"train_loss": 1.0, "test_accuracy": accuracy, "seconds": seconds}
    return [{"epoch": epoch + 1, **metrics} for epoch in range(epochs)]


def test_the_state_of_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    (config,) = grid(epochs=3)
    folder = RunFolder(tmp_path / config.name)

    def state() -> State:
        return read_status(folder, config).state

    assert state() == "missing"
    with folder.lock():
        assert state() == "running"
    assert state() == "unfinished"
    folder.write_failure("failed", "no memory", config.as_dict())
    assert (state(), read_status(folder, config).message) == ("failed", "no memory")
    assert folder.read_config() == {"run": config.as_dict()}
    folder.write_failure("diverged", "the loss is nan", config.as_dict())
    assert (state(), read_status(folder, config).result) == ("diverged", -math.inf)
    with pytest.raises(ZeroDivisionError), folder.attempt(config.as_dict()):
        _ = 1 / (folder.path / "failure.json").exists()  # it goes when the run is begun again
    assert (state(), read_status(folder, config).message) == (
        "failed",
        "ZeroDivisionError: division by zero",
    )
    folder.write_metrics(history(3, accuracy=0.25))
    assert (state(), read_status(folder, config).result) == ("done", 0.25)


def statuses(*rows: tuple[str, int, State, Sequence[Metrics]]) -> list[Status]:
    return [
        Status(grid(norms=[norm], batch_sizes=[batch_size], epochs=10)[0], state, metrics)
        for norm, batch_size, state, metrics in rows
    ]


def test_times_are_those_of_the_same_norm_or_of_the_same_batch_size() -> None:
    runs = statuses(
        ("batch", 8, "done", history(10, 2.0)),
        ("kernel", 8, "unfinished", history(4, 5.0)),
        ("kernel", 8, "missing", []),
        ("group", 8, "missing", []),
        ("kernel", 2, "missing", []),
    )
    assert seconds_left(runs, runs[:1]) == (0, 0)
    assert seconds_left(runs, runs[1:2]) == (6 * 5.0, 0)
    assert seconds_left(runs, runs[2:3]) == (10 * 5.0, 0)
    assert seconds_left(runs, runs[3:4]) == (pytest.approx(10 * (10 * 2.0 + 4 * 5.0) / 14), 0)
    assert seconds_left(runs, runs[4:]) == (0, 1)
    assert forecast(runs, runs[2:3], jobs=2) == "25 s"
    assert forecast(runs, runs[2:], jobs=1) == "more than 79 s"
    assert forecast(runs, runs[4:], jobs=1) == "unknown"
    assert forecast(runs, runs[:1], jobs=1) == "none"


@pytest.mark.parametrize(
    ("seconds", "words"), [(5.4, "5 s"), (100, "2 min"), (5340, "89 min"), (7500, "2 h 05 min")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_table_has_a_row_for_each_run_and_no_empty_columns() -> None:
    runs = statuses(("batch", 8, "done", history(10, 2.0)), ("kernel", 2, "missing", []))
    lines = [line.split() for line in table(runs)]
    assert lines == [
        ["norm", "batch", "size", "lr", "seed", "status", "accuracy", "s/epoch"],
        ["BatchNorm", "8", "0.005", "0", "done", "50.00%", "2.00"],
        ["KernelNorm", "2", "0.001", "0", "missing", "-", "-"],
    ]
    (variant,) = grid(norms=["kernel"], rules=[{"dropout_p": 0, "evaluation": "plain"}])
    assert "dropout_p=0, evaluation=plain" in table([Status(variant, "missing")])[1]


def test_equal_configurations_have_one_name() -> None:
    def name(lr: float = 1.0, **rules: Any) -> str:
        options = {"width": 0.125, "rules": rules}
        recipe = recipe_for("cifar10-vgg8")
        return configure(recipe, norm="kernel", batch_size=2, lr=lr, model_options=options).name

    assert name(1) == name(1.0) != name(2)
    assert name(dropout_p=0) == name(dropout_p=0.0) != name()
    assert name(dropout_p=0.1) == name(dropout_p=0.1, evaluation="expected") == name()
    assert name(dropout_p=0.1, evaluation="plain") != name()
