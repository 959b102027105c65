"""Where and how a run is executed."""

from __future__ import annotations

import os
import platform
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import kernelnorm
from kernelnorm.experiments.errors import RunError, to_install
from kernelnorm.norms import describe

__all__ = [
    "Launch",
    "check_shares",
    "environment",
    "leave",
    "make_fabric",
    "over_processes",
    "share",
]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where and how a run is executed; none of this is part of the run's configuration.

    Args:
        out: the run's folder; ``None`` is ``runs/CASE/NAME``, with the configuration's case and
            name.
        data_dir: where datasets are looked for and downloaded to.
        accelerator: one of Lightning Fabric's: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        devices: the number of devices on this machine; ignored under ``torchrun``, which sets it.
        compile: run the network through :func:`torch.compile`, on one GPU with CUDA graphs.
        tensorboard: write TensorBoard's files too, in the run's folder.
        checkpoint_minutes: the longest time between two checkpoints within an epoch.
        max_steps: pause after that many steps, counted from the start of the run; ``None``: do not
            pause.
        init_from: a run's folder or a file with the weights that training starts from, whose
            fingerprint is the configuration's ``init_from``.
        verbose: print a line per epoch.

    Raises:
        RunError: ``max_steps`` is not positive, or TensorBoard is not installed.
    """

    out: Path | None = None
    data_dir: Path = Path("data")
    accelerator: str = "auto"
    devices: int = 1
    compile: bool = False
    tensorboard: bool = False
    checkpoint_minutes: float = 10.0
    max_steps: int | None = None
    init_from: Path | None = None
    verbose: bool = True

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            raise RunError(f"max_steps must be positive, got {self.max_steps}")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise RunError(f"--tensorboard needs: {to_install('tensorboard')}")


def make_fabric(accelerator: str, *, devices: int = 1, precision: str = "32-true") -> Fabric:
    """Make Lightning Fabric; under ``torchrun``, for the processes that it started.

    Raises:
        RunError: this machine has no such device, or too few of them.
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


def check_precision(fabric: Fabric, precision: str) -> None:
    """Check that the device trains in a precision: on CPUs Fabric would take another.

    Raises:
        RunError: it does not.
    """
    if precision == "16-mixed" and fabric.device.type == "cpu":
        raise RunError("--precision 16-mixed needs a GPU: choose bf16-mixed or 32-true")


def check_shares(fabric: Fabric, norm: str, batch_size: int) -> None:
    """Check that the processes can share a batch.

    Raises:
        RunError: the batch size is not a multiple of the number of processes, or the norm depends
            on the batch; only BatchNorm on CUDA can be synchronised.
    """
    if batch_size % fabric.world_size:
        raise RunError(
            f"a batch of {batch_size} images cannot be shared out evenly over "
            f"{fabric.world_size} processes: change --batch-size or the number of processes"
        )
    if fabric.world_size == 1 or describe(norm).group != "batch-dependent":
        return
    if norm != "batch" or fabric.device.type != "cuda":
        where = " without CUDA" if norm == "batch" else ""
        raise RunError(
            f"{describe(norm).label} cannot be trained in several processes{where}: each would "
            "normalise only its part of a batch. Use one process, or another --norm"
        )


def share(fabric: Fabric, network: nn.Module, seed: int) -> nn.Module:
    """Prepare a network, which has the same weights in all processes, for training by all of them.

    BatchNorm becomes SyncBatchNorm, and each process draws its own dropout masks.
    """
    if fabric.global_rank > 0:
        own = random.Random(f"{seed}, {fabric.global_rank}")  # seed + rank may be another's
        torch.manual_seed(own.getrandbits(63))
    if fabric.world_size > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def environment(fabric: Fabric, compile: bool = False) -> dict[str, Any]:
    """Return versions, device, processes, threads, and ``compile`` if true, for people to read."""
    device = fabric.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "kernelnorm": kernelnorm.__version__,
        "torch": str(torch.__version__),
        "device": f"{device.type}: {name}",
        "processes": fabric.world_size,
        **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),
        **({"compile": True} if compile else {}),  # else as in runs of older versions
    }


def over_processes(fabric: Fabric, x: Tensor) -> Tensor:
    """Return the sum of ``x`` over all processes."""
    return cast(Tensor, fabric.all_reduce(x, reduce_op="sum"))


def leave() -> None:
    """Synchronise all processes, then tear down the process group.

    A process that exits while another still communicates with it would abort the other one.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
