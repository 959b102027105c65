"""Small private runs, and their steps taken one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("opacus")

from lightning_fabric import Fabric

from kernelnorm.experiments import trainer
from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.data import Images
from kernelnorm.experiments.private_options import Privacy
from kernelnorm.experiments.private_steps import PrivateSteps
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.steps import Material

SMALL: dict[str, Any] = {"batch_size": 16, "epochs": 2, "subset": 60, "image_size": 8, "lr": 0.05}
PER_EPOCH = 4  # 60 / 16, rounded


def small(norm: str = "kernel", **options: Any) -> RunConfig:
    """A private run of 8 steps; the options of private training and of others."""
    names = Privacy.__dataclass_fields__
    privacy = Privacy(**{name: options.pop(name) for name in [*options] if name in names})
    recipe = replace(recipe_for("digits-vgg8"), model_options={"width": 0.0625})
    return configure(recipe, **{"norm": norm, **SMALL, "private": privacy, **options})


known = pytest.mark.usefixtures("known_noise")


def images_of(n: int = 12, size: int = 8) -> Images:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (n, 1, size, size), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % 3, ("a", "b", "c"))


def in_float64(pixels: Tensor) -> Tensor:
    return pixels.double() / 255


def steps_of(config: RunConfig, images: Images, dropout: bool = False) -> PrivateSteps:
    """Private steps in float64, without noise, and without dropout if a loop is to repeat them."""
    torch.manual_seed(0)
    if config.norm == "kernel" and not dropout:
        options = {**config.model_options, "rules": {"dropout_p": 0.0}}
        config = replace(config, model_options=options)
    network = trainer.build_network(config, num_classes=3, in_channels=1).double()
    fabric = Fabric(accelerator="cpu", devices=1)
    steps = PrivateSteps(Material(config, fabric, network, images, in_float64, False))
    steps.optimizer.noise_multiplier = 0.0
    return steps
