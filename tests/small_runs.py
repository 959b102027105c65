"""Runs of seconds, and what tests compare of two of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.runs import RunFolder

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


def weights(out: Path) -> dict[str, torch.Tensor]:
    state = RunFolder(out).load("last.ckpt")
    assert state is not None
    weights_: dict[str, torch.Tensor] = state["model"]
    return weights_


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def without_times(out: Path) -> list[dict[str, float]]:
    timed = ("seconds", "images_per_second", "startup_seconds")
    return [{k: v for k, v in m.items() if k not in timed} for m in RunFolder(out).read_metrics()]
