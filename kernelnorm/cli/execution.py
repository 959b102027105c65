"""Executes the runs of a plan, for ``sweep`` and ``reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.options import where

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from kernelnorm.experiments.sweep import Plan, Pool


def add_sweep_arguments(parser: ArgumentParser) -> None:
    """Add the options for parallel runs, a Ray cluster and a dry run."""
    jobs_help = "parallel runs (default: one per core, or per 8 GiB of GPU memory)"
    add = parser.add_argument
    add("--jobs", type=values.positive_int, help=jobs_help)
    ray_help = "use a Ray cluster: auto (the one of this machine), local (start one) or HOST:PORT"
    add("--ray", type=values.text, nargs="?", const="auto", metavar="ADDRESS", help=ray_help)
    gpus_help = "GPUs of a run, with --ray (default: 0.25 if there are GPUs)"
    add("--gpus-per-run", type=values.number, help=gpus_help)
    add("--cpus-per-run", type=values.positive_int, help="CPUs of a run, with --ray (default: 1)")
    add("--dry-run", action="store_true", help="only list the runs and estimate their time")


def execute_plan(plan: Plan, out: Path, arguments: Namespace) -> None:
    """Train the runs of a plan, or list them with ``--dry-run``.

    Raises:
        RunError: runs have failed, or the options contradict each other.
    """
    from kernelnorm.experiments.errors import RunError
    from kernelnorm.experiments.sweep import dry_run, sweep

    shares = arguments.gpus_per_run, arguments.cpus_per_run
    if arguments.ray is None and shares != (None, None):
        raise RunError("--gpus-per-run and --cpus-per-run are for a cluster: add --ray")
    if arguments.ray is not None and arguments.jobs:
        raise RunError("--jobs is for this machine: with --ray give --cpus-per-run")
    if arguments.ray is not None and arguments.dry_run:
        raise RunError("--dry-run does not ask a cluster: give --jobs instead of --ray")
    if arguments.dry_run:
        dry_run(plan, out, _jobs(arguments), arguments.data_dir)
        return
    statuses = sweep(plan, out, _make_pool(arguments, out), arguments.data_dir)
    failed = sum(status.result is None for status in statuses)
    if failed:
        raise RunError(
            f"runs that have failed: {failed}. In the folder of each, failure.json says why, and "
            "output.txt, if it exists, holds the printed output. Run the same command to try again"
        )


def _jobs(arguments: Namespace) -> int:
    from kernelnorm.experiments.sweep import default_jobs

    return arguments.jobs or default_jobs(arguments.accelerator)


def _make_pool(arguments: Namespace, out: Path) -> Pool:
    from kernelnorm.experiments.launch import Launch
    from kernelnorm.experiments.sweep import LocalPool
    from kernelnorm.experiments.sweep.cluster import RayPool

    launch = Launch(**where(arguments))
    if arguments.ray is None:
        return LocalPool(launch, _jobs(arguments))
    gpus, cpus = arguments.gpus_per_run, arguments.cpus_per_run or 1
    return RayPool(launch, out, arguments.ray, gpus=gpus, cpus=cpus)
