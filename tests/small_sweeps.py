"""Sweeps of a few small runs, and a pool that executes them in this process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.sweep import make_grid
from kernelnorm.experiments.sweep.execute import execute

LAUNCH = Launch(accelerator="cpu")
SMALL = ["--subset=60", "--image-size=8", "--accelerator=cpu"]


def small(**options: Any) -> list[RunConfig]:
    given: dict[str, Any] = {"norms": ["batch", "layer"], "batch_sizes": [8], "epochs": 2}
    given |= {"subset": 60, "image_size": 8}
    return make_grid(recipe_for("digits-vgg8"), **{**given, **options})


class Here:
    """A pool whose runs are executed in this process, one at a time; it may lose some."""

    places = 1

    def __init__(self, lost: Sequence[RunConfig] = ()) -> None:
        self.lost, self.submitted = lost, list[RunConfig]()

    def submit(self, config: RunConfig, out: Path) -> Future[str]:
        self.submitted.append(config)
        future: Future[str] = Future()
        if config in self.lost:
            future.set_exception(BrokenProcessPool("terminated abruptly"))
        else:
            future.set_result(execute(config, LAUNCH, out))
        return future

    def close(self) -> None:
        pass
