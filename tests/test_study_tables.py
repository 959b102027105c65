"""The tables of studies are those that their programs print from the committed records."""

from __future__ import annotations

import importlib.machinery
import json
import math
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from kernelnorm.experiments.data import Images

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
NAMES = {
    "mobilenet_v3_small": "MobileNetV3-small",
    "resnet18": "ResNet-18",
    "shufflenet_v2_x1_0": "ShuffleNetV2",
    "fasternet_t0": "FasterNet-T0",
    "googlenet": "GoogLeNet",
    "regnet_y_400mf": "RegNetY-400MF",
    "efficientnet_b0": "EfficientNet-B0",
    "resnet50": "ResNet-50",
    "vgg16_bn": "VGG16-BN (CIFAR-10)",
}


def printed(
    script: str,
    *arguments: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What a program in benchmarks prints."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    return capsys.readouterr().out


def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace libraries of networks, which the table does not need."""
    for name in ("timm", "torchvision"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


def test_private_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fair comparison takes the kernel network's runs from the other folder."""
    options = {"monkeypatch": monkeypatch, "capsys": capsys}
    tables = printed("private_cifar10.py", "table", "--out", str(RESULTS / "private"), **options)
    page = (RESULTS / "private.md").read_text()
    assert len(tables.strip().split("\n\n")) == 2
    for table in tables.strip().split("\n\n"):
        assert table in page


def test_converted_networks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_libraries(monkeypatch)
    file = RESULTS / "convert" / "results.jsonl"
    options = {"monkeypatch": monkeypatch, "capsys": capsys}
    table = printed("convert.py", "--table", "--results", str(file), **options)
    page = (RESULTS / "convert.md").read_text().replace("**", "")
    rows = re.findall(r"^\| (\w+) \| \d+ \| (.*)$", table, re.M)
    assert len(rows) == 18
    for name, cells in rows:
        assert f"\n| {NAMES[name]} | {cells}\n" in page


def test_a_run_that_diverged_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its accuracy is null; the search for a learning rate takes it as the worst."""
    without_libraries(monkeypatch)
    convert: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "convert.py"))
    monkeypatch.setitem(convert["train"].__globals__, "make_network", small_network)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.arange(10), tuple("abcdefghij"))
    run = {"norm": "batch", "image_size": 8, "epochs": 1, "seed": 0}
    results = []
    for network, rate in (("small", 0.001), ("broken", 0.1)):
        trained = {**run, "network": network, "rate": rate}
        results.append({**trained, "accuracy": convert["train"](trained, [images] * 2)})
    lowest, highest = convert["rates_tried"](json.loads(json.dumps(results))).values()
    assert 0 <= lowest <= 1
    assert highest == -math.inf


def small_network(name: str, *_: object) -> nn.Module:
    """A linear layer; the loss of the broken one is not a number."""
    layer = nn.Linear(3 * 8 * 8, 10)
    if name == "broken":
        nn.init.constant_(layer.bias, math.nan)
    return nn.Sequential(nn.Flatten(), layer)
