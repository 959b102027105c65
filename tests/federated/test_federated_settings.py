"""The run configuration: what is refused, and how the message says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernelnorm_federated.settings import SettingError, Settings

Make = Callable[..., Settings]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("norm", "bach", "one of batch, group, .*fixbn"),
        ("model", "vgg9", "with norm kernel, vgg8, resnet18"),
        ("width", 0.0, "above 0"),
        ("width", float("nan"), "above 0"),
        ("data", "digit", "digits, cifar10, .* or the absolute path of a folder"),
        ("partition", "iid", "one of even, dirichlet, classes"),
        ("alpha", -0.1, "above 0"),
        ("classes-per-client", 0, "1 or more"),
        ("clients", 0, "1 or more"),
        ("fraction-train", 1.5, "above 0, at most 1"),
        ("local-epochs", -1, "1 or more"),
        ("batch-size", 8.0, "a whole number"),
        ("learning-rate", "0.1", "a number"),
        ("learning-rate", float("inf"), "above 0"),
        ("momentum", 1.0, "0 or more, below 1"),
        ("strategy", "fedsgd", "one of fedavg, fedprox, fedadam"),
        ("proximal-mu", -1.0, "0 or more"),
        ("server-learning-rate", 0.0, "above 0"),
        ("num-server-rounds", True, "a whole number"),
        ("seed", -1, "0 or more"),
        ("seed", 1 << 63, r"less than 2\*\*63"),
        ("test-on", "train", "one of test, held-out"),
        ("timeout", 0.0, "above 0"),
        ("out", "runs", "an absolute path"),
        ("norm", 3, "text in quotes"),
        ("lr", 0.1, "one of the keys model, width"),
    ],
)
def test_an_error_names_key_value_and_what_was_expected(
    run_config: dict[str, Any], key: str, value: object, expected: str
) -> None:
    with pytest.raises(SettingError, match=f"run-config {key}={value!r}: expected .*{expected}"):
        Settings.from_run_config({**run_config, key: value})


def test_a_missing_key_is_named(run_config: dict[str, Any]) -> None:
    del run_config["alpha"]
    with pytest.raises(SettingError, match="alpha"):
        Settings.from_run_config(run_config)


def test_a_model_without_the_norm_is_refused(settings: Make) -> None:
    with pytest.raises(SettingError, match="model='knresnet18': expected with norm batch, vgg8"):
        settings(model="knresnet18", norm="batch")


def test_a_named_data_set_needs_its_place(settings: Make) -> None:
    with pytest.raises(SettingError, match="data-dir='data': expected the absolute path of cifar"):
        settings(data="cifar10", data_dir="data")


def test_held_out_images_need_numbers_of_images(settings: Make) -> None:
    with pytest.raises(SettingError, match="train-images=0: expected a number of images"):
        settings(test_on="held-out", train_images=0)


def test_a_whole_number_may_stand_for_a_number(settings: Make) -> None:
    assert settings(learning_rate=1).learning_rate == 1.0


def test_statistics_are_frozen_after_half_of_the_rounds_by_default(settings: Make) -> None:
    assert settings(norm="fixbn", num_server_rounds=8).first_frozen_round == 5
    assert settings(norm="fixbn", num_server_rounds=8, fixbn_round=2).first_frozen_round == 2
    assert settings(norm="batch").first_frozen_round is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_server_rounds": 1}, "num-server-rounds=1: expected at least 2 with norm fixbn"),
        ({"fixbn_round": 1}, "fixbn-round=1: expected from 2 to 3, the number of rounds"),
        ({"fixbn_round": 4}, "fixbn-round=4: expected from 2 to 3, the number of rounds"),
    ],
)
def test_statistics_are_frozen_during_the_run(
    settings: Make, values: dict[str, int], message: str
) -> None:
    settings(**values)  # other norms
    settings(norm="fixbn", fixbn_round=3)
    with pytest.raises(SettingError, match=message):
        settings(norm="fixbn", **values)


def test_each_configuration_has_a_folder_unless_one_is_given(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", "/home/flower")
    folders = {settings(out="", seed=seed).folder for seed in (0, 1)}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {Path("/home/flower/kernelnorm-federated")}
    assert settings(out="", timeout=9.0).folder in folders
    assert settings(out="/somewhere/run").folder == Path("/somewhere/run")
