"""The recipes are the paper's, and a configuration names its run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.paper import auto_lr, paper
from kernelnorm.experiments.recipes import NAMED_DATASETS, RECIPES, Recipe, recipe_for
from kernelnorm.experiments.sweep.reproduction import scale_of


def test_recipes_are_the_papers() -> None:
    woof = RECIPES["imagewoof-resnet18"]
    assert (woof.weight_decay, woof.lr_milestones, woof.image_size) == (1e-4, (60,), 192)
    nette = RECIPES["imagenette-densenet121"]
    assert (nette.weight_decay, nette.lr_milestones, nette.image_size) == (0, (), 160)
    cifar = RECIPES["cifar10-vgg8"]
    assert not cifar.augment
    assert not cifar.standardise
    for recipe in (woof, nette, cifar):
        assert (recipe.epochs, recipe.momentum) == (80, 0.9)


def test_cases_have_named_data_sets_and_a_small_scale() -> None:
    assert {recipe.dataset for recipe in RECIPES.values()} <= NAMED_DATASETS
    for case in RECIPES:
        assert scale_of(case, "small").batch_sizes


def test_learning_rate_is_a_tenth_from_epoch_60() -> None:
    config = configure(RECIPES["imagewoof-resnet18"], norm="batch", batch_size=32)
    assert config.lr_at(59) == 0.05
    assert config.lr_at(60) == pytest.approx(0.005)


@pytest.mark.parametrize("case", ["cifar10-vgg8", "imagenette-densenet121", "imagewoof-resnet18"])
def test_paper_tables_are_whole(case: str) -> None:
    tables = paper()[case]
    columns = {"batch_size", "batch", "group", "layer", "kernel"}
    sizes = {"accuracy": [], "learning_rate": []}
    for table, seen in sizes.items():
        for row in tables[table]["rows"]:
            assert set(row) == columns
            seen.append(row["batch_size"])
    assert sizes["accuracy"] == sizes["learning_rate"]
    assert sizes["accuracy"][-5:] == [16, 32, 64, 128, 256]
    for row in tables["learning_rate"]["rows"]:
        assert set(row.values()) - {row["batch_size"]} <= set(tables["learning_rate"]["tried"])


@pytest.mark.parametrize(
    ("case", "norm", "batch_size", "expected"),
    [
        ("cifar10-vgg8", "kernel", 32, (0.025, "Table 4(a), KernelNorm, batch size 32", True)),
        (
            "imagenette-densenet121",
            "batch",
            256,
            (0.1, "Table 4(b), BatchNorm, batch size 256", True),
        ),
        ("imagewoof-resnet18", "layer", 16, (0.005, "Table 4(c), LayerNorm, batch size 16", True)),
    ],
)
def test_lr_is_table_4s(
    case: str, norm: str, batch_size: int, expected: tuple[object, ...]
) -> None:
    assert auto_lr(RECIPES[case], norm, batch_size) == expected


def test_lr_beside_the_table_is_scaled_from_the_nearest_and_says_so() -> None:
    lr, source, exact = auto_lr(RECIPES["imagewoof-resnet18"], "instance", 4)
    assert (lr, exact) == (0.0018, False)
    assert source == "0.005 (Table 4(c), GroupNorm, batch size 16) times (4/16)^0.75"
    assert auto_lr(RECIPES["cifar10-vgg8"], "batch", 100).lr == 0.042  # from 128, the nearer one
    assert auto_lr(RECIPES["cifar10-vgg8"], "batch", 512).lr == 0.084


def test_the_exponent_is_the_best_of_three() -> None:
    """By the largest error in each column of Table 4, in logarithms."""
    errors = dict.fromkeys((0.5, 0.75, 1.0), 0)
    for case in paper().values():
        rows = case["learning_rate"]["rows"]
        for column in ("batch", "group", "layer", "kernel"):
            worst = {}
            for exponent in errors:
                left = [
                    math.log2(row[column]) - exponent * math.log2(row["batch_size"]) for row in rows
                ]
                worst[exponent] = max(left) - min(left)
            errors[min(worst, key=lambda exponent: worst[exponent])] += 1
    assert max(errors, key=lambda exponent: errors[exponent]) == 0.75, errors


@pytest.mark.parametrize(
    ("recipe", "source"),
    [
        (recipe_for("digits-vgg8"), "Table 4(a), GroupNorm, batch size 32, for cifar10-vgg8"),
        (
            recipe_for(model="resnet18", dataset="photos"),
            "Table 4(c), GroupNorm, batch size 32, for imagewoof-resnet18",
        ),
    ],
    ids=["digits", "photos"],
)
def test_lr_of_a_case_that_is_not_the_papers_is_not_exact(recipe: Recipe, source: str) -> None:
    assert auto_lr(recipe, "group", 32)[1:] == (source, False)


def test_any_model_and_folder_take_the_recipe_of_the_family() -> None:
    recipe = recipe_for(model="resnet50", dataset="some/photos")
    expected = dataclasses.replace(
        RECIPES["imagewoof-resnet18"],
        case="photos-resnet50",
        model="resnet50",
        dataset="some/photos",
    )
    assert recipe == expected
    assert recipe_for(dataset="some/photos").model == "resnet18"
    assert recipe_for("digits-vgg8", model="resnet18").model_options == {}
    assert recipe_for() == RECIPES["digits-vgg8"]


def test_a_folder_has_one_name() -> None:
    for dataset in ("photos/", "./photos", Path("photos")):
        recipe = recipe_for(model="resnet18", dataset=dataset)
        assert recipe == recipe_for(model="resnet18", dataset="photos")
        assert configure(recipe_for(), norm="kernel", batch_size=2, dataset=dataset) == configure(
            recipe_for(), norm="kernel", batch_size=2, dataset="photos"
        )
    assert recipe_for(model="resnet18", dataset="./digits").dataset == "./digits"  # a folder


def test_another_named_dataset_keeps_its_size() -> None:
    assert recipe_for(model="resnet18", dataset="cifar10").image_size is None
    assert recipe_for("digits-vgg8", dataset="cifar10").image_size is None
    assert recipe_for(model="resnet50", dataset="imagewoof").image_size == 192
    assert recipe_for(model="resnet18", dataset="photos").image_size == 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"case": "mnist"}, "unknown case 'mnist': choose from .*digits-vgg8"),
        ({"model": "alexnet"}, "unknown model 'alexnet': choose from vgg8, resnet18"),
        ({"model": "resnet18"}, "--model resnet18 needs --dataset"),
    ],
)
def test_unknown_recipes_are_errors(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        recipe_for(**arguments)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"norm": "weight"}, "unknown norm 'weight': choose from batch, group"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"epochs": -1}, "epochs must be positive, got -1"),
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"subset": -5}, "subset must be positive, got -5"),
        ({"weight_decay": -0.1}, r"--weight-decay must be between 0 and 3e\+38, got -0.1"),
        ({"weight_decay": 1e300}, r"--weight-decay must be between 0 and 3e\+38, got 1e\+300"),
        ({"lr": 0.0}, r"learning rate must be positive, at most 3e\+38, got 0.0"),
        ({"lr": 1e300}, r"learning rate must be positive, at most 3e\+38, got 1e\+300"),
        ({"lr": float("nan")}, "learning rate must be positive, .* got nan"),
        ({"model_options": {"num_classes": 3}}, "model_options cannot set num_classes: the norm"),
        ({"norm": "nf", "agc": 0.0}, "agc must be positive, got 0.0"),
        ({"norm": "nf", "precision": "16-mixed"}, "choose --precision bf16-mixed or 32-true"),
    ],
)
def test_choices_out_of_range_are_errors(choices: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        configure(recipe_for(), **{"norm": "kernel", "batch_size": 32, **choices})  # type: ignore[arg-type]


def test_another_versions_record_is_an_error() -> None:
    record = configure(recipe_for(), norm="kernel", batch_size=32).as_dict()
    with pytest.raises(RunError, match=r"not of this version of kernelnorm: .*'dropout'"):
        RunConfig.from_dict({**record, "dropout": 0.5})
    del record["lr"]
    with pytest.raises(RunError, match=r"not of this version of kernelnorm: .*'lr'"):
        RunConfig.from_dict(record)


def test_a_new_field_with_a_default_changes_neither_name_nor_record() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(RunConfig):
        dropout: float = 0.0

    config = configure(recipe_for(), norm="kernel", batch_size=32)
    record = config.as_dict()
    later = Later.from_dict(record)
    assert later.name == config.name
    assert dataclasses.replace(later, dropout=0.5).name != config.name  # type: ignore[call-arg]
    assert Later.defaults() == {**RunConfig.defaults(), "dropout": 0.0}
    del record["lr_milestones"]
    assert RunConfig.from_dict(record) == config


def test_name_is_a_function_of_every_field() -> None:
    config = configure(recipe_for(), norm="kernel", batch_size=32)
    assert config.name.startswith("kernel-b32-seed0-")
    assert config.name == configure(recipe_for(), norm="kernel", batch_size=32).name
    for changes in ({"lr": 0.1}, {"epochs": 7}, {"precision": "bf16-mixed"}, {"subset": 10}):
        assert dataclasses.replace(config, **changes).name != config.name


def test_adaptive_gradient_clipping_is_for_norms_that_need_it() -> None:
    def agc(norm: str, **choices: float) -> float | None:
        return configure(recipe_for(), norm=norm, batch_size=32, **choices).agc

    assert agc("nf") == 0.01
    assert agc("nf", agc=0.16) == 0.16
    assert agc("kernel") is agc("kernel", agc=0.16) is None


def test_record_round_trips() -> None:
    config = configure(RECIPES["imagewoof-resnet18"], norm="layer", batch_size=16, seed=3)
    assert RunConfig.from_dict(config.as_dict()) == config


def test_training_ends_when_the_loss_stays_below_a_thousandth() -> None:
    config = configure(recipe_for(), norm="kernel", batch_size=32, epochs=80)
    low, high = {"train_loss": 9e-4}, {"train_loss": 2e-3}
    assert config.finished([high, *[low] * 5])
    assert not config.finished([low] * 4)
    assert not config.finished([low, low, high, low, low])
    assert config.finished([high] * 80)


def test_a_norm_that_a_model_does_not_have_is_an_error_with_the_models_that_have_it() -> None:
    message = r"densenet121 does not exist with the norm nf: .* one of the models vgg8, resnet18"
    with pytest.raises(RunError, match=message):
        configure(recipe_for("imagenette-densenet121"), norm="nf", batch_size=32)
