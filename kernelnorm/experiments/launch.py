"""Where and how a run is executed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from kernelnorm.experiments.runs import RunError

__all__ = ["Launch", "make_fabric", "over_processes"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where and how a run is executed: nothing here is part of what the run is.

    Args:
        out: the run's folder; ``None`` is ``runs/CASE/`` and the configuration's name.
        data_dir: where datasets are looked for and downloaded to.
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``: as Lightning Fabric names them.
        devices: how many of them, on this machine; under ``torchrun`` it says how many.
        compile: run the network through :func:`torch.compile`.
        tensorboard: write TensorBoard's files too, in the run's folder.
        checkpoint_minutes: the longest time between two checkpoints within an epoch.
        max_steps: pause after that many steps; without it the run goes on.
        verbose: print a line per epoch.
    """

    out: Path | None = None
    data_dir: Path = Path("data")
    accelerator: str = "auto"
    devices: int = 1
    compile: bool = False
    tensorboard: bool = False
    checkpoint_minutes: float = 10.0
    max_steps: int | None = None
    verbose: bool = True


def make_fabric(accelerator: str, *, devices: int = 1, precision: str = "32-true") -> Fabric:
    """Make Lightning Fabric; under ``torchrun``, for the processes that it started.

    Raises:
        RunError: there is no such device here, or not so many.
    """
    nodes, strategy = 1, "auto"
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes, strategy = int(os.environ["WORLD_SIZE"]) // devices, "ddp"
    try:
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
        )
    except (ImportError, MisconfigurationException, RuntimeError, ValueError) as error:
        raise RunError(f"cannot use {devices} x accelerator {accelerator!r}: {error}") from error


def over_processes(fabric: Fabric, x: Tensor) -> Tensor:
    """Return the sum of the tensors that the processes have."""
    return cast(Tensor, fabric.all_reduce(x, reduce_op="sum"))
