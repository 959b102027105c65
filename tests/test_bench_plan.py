"""What the bench plans to measure, and the options that it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelnorm.cli import main
from kernelnorm.experiments.bench import make_plan
from kernelnorm.experiments.errors import RunError


def test_plan_without_options() -> None:
    plan = make_plan()
    assert [str(row.case) for row in plan.rows][::2] == [
        "VGG8, 32×32, batch 2",
        "VGG8, 32×32, batch 32",
        "ResNet-18, 192×192, batch 2",
        "ResNet-18, 192×192, batch 32",
        "DenseNet-121, 160×160, batch 2",
        "DenseNet-121, 160×160, batch 32",
    ]
    assert [row.pass_ for row in plan.rows] == ["train", "inference"] * 6
    assert [*map(str, plan.columns)] == ["none", "batch", "group", "layer", "kernel"]
    assert plan.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_quick_plan() -> None:
    plan = make_plan(quick=True)
    assert [str(row.case) for row in plan.rows][::2] == [
        "VGG8, 32×32, batch 2",
        "VGG8, 32×32, batch 32",
        "ResNet-18, 96×96, batch 4",
        "DenseNet-121, 64×64, batch 4",
    ]
    assert (plan.rounds, plan.seconds) == (9, 4.0)
    assert make_plan(quick=True, rounds=3).rounds == 3


def test_sizes_follow_the_networks() -> None:
    networks = ["resnet50", "vgg8", "efficientnet_b0"]
    plan = make_plan(networks=networks, batch_sizes=[1], passes=["train"])
    assert [row.case.image_size for row in plan.rows] == [192, 32, 192]
    plan = make_plan(networks=["resnet50", "vgg8"], sizes=[224, 8], modes=["eager", "compile"])
    assert [row.case.image_size for row in plan.rows] == [224] * 8 + [8] * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ["vgg9"]}, "--networks: unknown 'vgg9', choose from: vgg8, resnet18"),
        ({"networks": ["vgg8", "vgg8"]}, "--networks must have each name once, got vgg8,vgg8"),
        ({"sizes": [32, 64]}, "--sizes must have a number for each of the 3 networks"),
        ({"sizes": [32, 0, 32]}, "--sizes must be at least 1, got 0"),
        ({"batch_sizes": [2, -1]}, "--batch-sizes must be at least 1, got -1"),
        ({"norms": ["batch", "weight"]}, "--norms: unknown 'weight', choose from: batch, group"),
        (
            {"norms": ["none", "kernel"]},
            "--norms must include batch, as times are ratios to it, got none,kernel",
        ),
        ({"passes": []}, "--passes is empty, choose from: train, inference"),
        ({"passes": ["backward"]}, "--passes: unknown 'backward', choose from: train, inference"),
        ({"dtypes": ["float64"]}, "--dtypes: unknown 'float64', choose from: float32, bfloat16"),
        ({"dtypes": ["float16"]}, "--dtypes float16 needs a CUDA device, got --device cpu"),
        (
            {"modes": ["fast"]},
            "--modes: unknown 'fast', choose from: eager, compile, reduce-overhead",
        ),
        ({"modes": ["reduce-overhead"]}, "--modes reduce-overhead needs a CUDA device"),
        (
            {"memory_formats": ["last"]},
            "--memory-formats: unknown 'last', choose from: channels_last",
        ),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"rounds": 1}, "--rounds must be at least 2, got 1"),
        ({"seconds": -1}, "--seconds must be at least 0, got -1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=f"^{re.escape(message)}"):
        make_plan(device="cpu", **options)


def test_a_wrong_option_creates_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--modes must have each name once"):
        main(["bench", "--device=cpu", f"--out={tmp_path / 'out'}", "--modes=eager,eager"])
    assert not (tmp_path / "out").exists()


def test_quick_has_its_own_cases() -> None:
    with pytest.raises(RunError, match="leave out --quick, or --networks, --sizes"):
        make_plan(quick=True, networks=["vgg8"], sizes=[32])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(RunError, match="--device cuda: PyTorch finds no CUDA device here"):
        make_plan(device="cuda")


@pytest.mark.parametrize(
    ("option", "message"),
    [("--batch-sizes=two", "two"), ("--device=gpu", "gpu"), ("--rounds=few", "few")],
)
def test_what_is_not_a_number_or_a_device(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", option])
    assert message in capsys.readouterr().err
