"""Trains one run of a sweep, and returns its error message, if any."""

from __future__ import annotations

import gc
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.errors import DataError, RunError, error_message
from kernelnorm.experiments.heap import keep_freed_memory
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.trainer import train

__all__ = ["COMPILE_THREADS", "execute"]

COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
"""The variable with the number of processes that ``torch.compile`` starts, which PyTorch reads as
the process begins. By default it is one per core, and each takes half a gigabyte: too much for many
runs at a time."""


def execute(config: RunConfig, launch: Launch, out: Path) -> str:
    """Train a run, or resume it, in a process that does nothing else.

    Args:
        config: the run's configuration.
        launch: how the run is executed; its ``out`` is replaced.
        out: the run's folder.

    Returns:
        the error message, or an empty string.
    """
    keep_freed_memory()
    try:
        train(config, replace(launch, out=out, verbose=False))
    except Exception as error:  # the other runs go on after any error
        if not isinstance(error, (DataError, RunError)):
            traceback.print_exc()
        return error_message(error)
    finally:  # the process goes on, and other processes need the GPU's memory
        gc.collect()
        torch.cuda.empty_cache()
    return ""
