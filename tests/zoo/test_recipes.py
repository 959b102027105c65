"""Each Python block of docs/recipes.md runs, and what the page says about it holds."""

from __future__ import annotations

import pydoc
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import kernelnorm.timm
from kernelnorm import KernelNorm2d, KNConv2d, KNConv3d

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
RECIPES = {
    heading: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for heading, section in re.findall(
        r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
}


TRAINED = ["segmentation_models_pytorch", "torchvision's detectors", "MONAI", "nnU-Net"]


def run(heading: str) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    (block,) = RECIPES[heading]
    exec(block, variables)
    return variables


def test_no_python_block_stands_outside_of_the_recipes() -> None:
    assert sum(map(len, RECIPES.values())) == PAGE.count("```python") > 0


@pytest.mark.parametrize("heading", RECIPES)
def test_the_recipe_runs(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = run(heading).get("network")
    if heading in TRAINED:
        gradients = {name: p.grad is not None for name, p in network.named_parameters()}
        missing = [name for name, there in gradients.items() if not there]
        # without deep supervision only the last of them is used
        assert missing == [name for name in gradients if name.startswith("decoder.seg_layers.0")]


@pytest.mark.parametrize("heading", TRAINED)
def test_no_norm_is_left_but_kernel_norm(heading: str) -> None:
    layers = [*run(heading)["network"].modules()]
    assert [layer for layer in layers if isinstance(layer, (KNConv2d, KNConv3d))]
    leaves = {type(layer).__name__ for layer in layers if not [*layer.children()]}
    assert {name for name in leaves if "Norm" in name} <= {"KernelNorm2d", "KernelNorm3d"}


def test_the_names_in_a_plans_file_are_found() -> None:
    (name,) = re.findall(r'"conv_op": "(.*?)"', PAGE)
    assert pydoc.locate(name) is KNConv3d


@pytest.mark.parametrize("name", [name for name in kernelnorm.timm.__all__ if "kernel_" in name])
def test_the_table_has_the_reductions_of_each_network(name: str) -> None:
    rows = re.findall(r"^\| (`kernel_.*?) \| ([\d, ]+) \|", PAGE, re.MULTILINE)
    named = {pattern: row for names, row in rows for pattern in re.findall(r"`(.*?)`", names)}
    (row,) = [row for pattern, row in named.items() if fnmatch(name, pattern)]
    with torch.device("meta"):
        info = timm.create_model(name, features_only=True).feature_info
    assert row == ", ".join(map(str, info.reduction()))


def test_the_last_feature_maps_are_kernel_normalised() -> None:
    backbone = run("timm")["backbone"]
    assert isinstance(backbone["head_0"], KernelNorm2d)
