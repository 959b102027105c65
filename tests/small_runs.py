"""Runs of seconds, and what tests compare of two of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.networks import read_weights
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.trainer import train

SMALL: dict[str, Any] = {"batch_size": 8, "epochs": 2, "subset": 60, "image_size": 8}
NARROW = {"width": 0.125}


def small(norm: str = "kernel", **choices: Any) -> RunConfig:
    given = {"norm": norm, "model_options": NARROW, **SMALL, **choices}
    return configure(recipe_for("digits-vgg8"), **given)


def command(out: Path, norm: str) -> list[str]:
    """Trains the run of :func:`small`, with a checkpoint after each step."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    options.append(f"--model-options={json.dumps(NARROW)}")
    every_step = ["--checkpoint-minutes=0", "--accelerator=cpu", f"--norm={norm}", f"--out={out}"]
    return [sys.executable, "-m", "kernelnorm", "train", "digits-vgg8", *options, *every_step]


def run(out: Path, init_from: Path | None = None, **choices: Any) -> RunFolder:
    """One epoch, or more."""
    if init_from is not None:
        choices["init_from"] = read_weights(init_from).fingerprint()
    config = small(**{"epochs": 1, **choices})
    return train(config, Launch(out=out, verbose=False, init_from=init_from))


def photos(root: Path, size: int = 8, label: str = "cat", test_size: int | None = None) -> Path:
    """A folder of colour images of two classes, with a split."""
    rng = np.random.default_rng(0)
    for split, pixels in (("train", size), ("val", test_size or size)):
        for name in (label, "dog"):
            for i in range(8):
                file = root / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                shape = (pixels, pixels, 3)
                Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(file)
    return root


def on(dataset: Path, **choices: Any) -> RunConfig:
    """One epoch on the images of a folder."""
    values = {**SMALL, "model_options": NARROW, "subset": None, "image_size": None, "lr": 0.01}
    recipe = recipe_for(model="vgg8", dataset=dataset)
    return configure(recipe, **{**values, "norm": "kernel", "epochs": 1, **choices})


def weights(out: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    state = RunFolder(out).load(name)
    assert state is not None
    weights_: dict[str, torch.Tensor] = state["model"]
    return weights_


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(x, b[name]) for name, x in a.items())


def assert_same_weights(a: Path, b: Path) -> None:
    assert_same(weights(a), weights(b))


def without_times(out: Path) -> list[dict[str, float]]:
    timed = ("seconds", "images_per_second", "startup_seconds")
    return [{k: v for k, v in m.items() if k not in timed} for m in RunFolder(out).read_metrics()]
