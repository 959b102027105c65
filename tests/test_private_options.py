"""The options of private training: their record, their errors, their help."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("opacus")

from kernelnorm import cli
from kernelnorm.experiments import trainer
from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.private_options import Privacy
from kernelnorm.experiments.trainer import train
from tests.private_runs import images_of, known, small, steps_of


def test_record_and_name() -> None:
    config = small(epsilon=3.0, ema=0.9)
    assert RunConfig.from_dict(config.as_dict()) == config
    assert config.name.startswith("kernel-b16-eps3-seed0-")
    older = config.as_dict()
    del older["private"]["secure_mode"]
    assert RunConfig.from_dict(older) == config
    assert (
        len({small(**o).name for o in ({}, {"delta": 1e-6}, {"augmentations": 2, "augment": True})})
        == 3
    )
    plain = replace(config, private=None)
    assert RunConfig.from_dict({**plain.as_dict(), "private": None}) == plain


def test_training_loss_ends_no_private_run() -> None:
    history = [{"train_loss": 1e-4}] * 6
    assert replace(small(epochs=80), private=None).finished(history)
    assert not small(epochs=80).finished(history)


@known
def test_no_statistics_of_private_images_are_used(tmp_path: Path) -> None:
    folder = train(replace(small("group"), standardise=True), Launch(out=tmp_path, max_steps=1))
    assert folder.read_config()["standardise"] == {"mean": [0.5], "std": [0.25]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"norm": "batch"},
            "norm batch cannot be trained privately: .*Choose another, such as kernel",
        ),
        ({"norm": "batch_renorm"}, "norm batch_renorm cannot be trained privately: it mixes"),
        ({"precision": "bf16-mixed"}, "needs precision 32-true, got bf16-mixed"),
        ({"augmentations": 4}, "4 augmentations of a sample.* add --augment true"),
        ({"augmentations": 0}, "augmentations must be at least 1, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        (
            {"micro_batch_size": 3, "augmentations": 4},
            "micro_batch_size must be at least the 4 augmentations of a sample.* got 3",
        ),
        ({"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be positive, got nan"),
        ({"delta": 1.0}, "delta must be between 0 and 1, got 1.0"),
        ({"ema": 1.0}, "ema must be between 0 and 1, got 1.0"),
    ],
)
def test_options_that_do_not_work_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "launch", "message"),
    [
        ({"norm": "instance"}, {}, "vgg8 with norm instance has layers that private .* Choose"),
        ({}, {"compile": True}, "leave out --compile"),
        ({}, {"devices": 2}, "runs in one process: leave out --devices"),
        ({"batch_size": 61}, {}, "a batch of 61 cannot be drawn from 60 training images"),
        ({"delta": 0.02}, {}, "--delta 0.02 guarantees nothing for 60 training images: .*1/60"),
        ({"epsilon": 1e-3}, {}, "no noise keeps 8 steps to epsilon 0.001 .* a larger --epsilon"),
    ],
)
def test_runs_that_do_not_work_are_errors(
    options: dict[str, Any], launch: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message):
        train(small(**options), Launch(out=tmp_path, accelerator="cpu", **launch))
    assert not (tmp_path / "last.ckpt").exists()


def test_without_opacus_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "kernelnorm.experiments.private_steps")
    monkeypatch.delattr("kernelnorm.experiments.private_steps")
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(RunError, match=r"needs opacus: pip install 'kernelnorm\[private\]'"):
        train(small(), Launch(out=tmp_path))


@known
def test_secure_mode_draws_by_torchcsprng(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcsprng", None)
    with pytest.raises(RunError, match="--secure-mode needs the package torchcsprng"):
        train(small(secure_mode=True), Launch(out=tmp_path))
    package = ModuleType("torchcsprng")
    package.create_random_device_generator = lambda _: torch.Generator().manual_seed(1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcsprng", package)
    secure = steps_of(small(secure_mode=True, batch_size=6), images_of())
    assert secure.optimizer.secure_mode
    assert secure.sampling.generator(0, 0) is secure.optimizer.generator
    assert not torch.equal(secure.sampling.draw(0, 0), secure.sampling.draw(0, 0))


@pytest.mark.parametrize("option", ["--epsilon=3", "--ema=0.9", "--secure-mode"])
def test_private_options_need_private(option: str) -> None:
    name = option.split("=")[0]
    with pytest.raises(SystemExit, match=f"{name} is for private training: add --private, or"):
        cli.main(["train", option])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--epsilon=0", "--epsilon must be a positive number, got '0'"),
        ("--delta=1", "--delta must be a number between 0 and 1, got '1'"),
        ("--ema=x", "--ema must be a number between 0 and 1, got 'x'"),
        ("--augmentations=0", "--augmentations must be a positive integer, got '0'"),
    ],
)
def test_wrong_values(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--private", option])
    assert message in capsys.readouterr().err


def test_the_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "kernelnorm train --private --epsilon 3" in text
    for field in Privacy.__dataclass_fields__:
        assert f"--{field.replace('_', '-')} " in text
    for default in ("(default: 8)", "(default: 1e-5)", "(default: 1)"):
        assert default in text


def test_the_command_passes_the_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig] = []

    def stop(config: RunConfig, launch: Launch) -> Iterator[None]:
        seen.append(config)
        raise RunError("stop")

    monkeypatch.setattr(trainer, "train", stop)
    options = "--epsilon=3 --delta=1e-6 --max-grad-norm=2 --ema=0.9 --micro-batch-size=8"
    with pytest.raises(SystemExit, match="stop"):
        cli.main(["train", "--private", *options.split()])
    assert seen[0].private == Privacy(
        epsilon=3.0, delta=1e-6, max_grad_norm=2.0, ema=0.9, micro_batch_size=8
    )
