"""Where the runs of a plan are executed: what ``sweep`` and ``reproduce`` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli.options import where

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from kernelnorm.experiments.sweep import Plan, Pool


def add_sweep_arguments(parser: ArgumentParser) -> None:
    """Add where runs are executed, and how many at a time."""
    jobs_help = "runs at a time; without it one for each core, or for each 8 GiB of a GPU's memory"
    add = parser.add_argument
    add("--jobs", type=int | None, help=jobs_help)
    ray_help = "on a Ray cluster: auto (that of this machine), local (begin one) or HOST:PORT"
    add("--ray", nargs="?", const="auto", metavar="ADDRESS", help=ray_help)
    gpus_help = "of a run, with --ray; without it a quarter where there are GPUs"
    add("--gpus-per-run", type=float | None, help=gpus_help)
    add("--cpus-per-run", type=int, default=1, help="with --ray")
    add("--dry-run", action="store_true", help="list the runs and their time, only")


def execute_plan(plan: Plan, out: Path, arguments: Namespace) -> None:
    """Do what :func:`add_sweep_arguments` says with a plan.

    Raises:
        RunError: runs have failed.
    """
    from kernelnorm.experiments.runs import RunError
    from kernelnorm.experiments.sweep import dry_run, sweep

    if arguments.dry_run:
        dry_run(plan, out, _jobs(arguments))
        return
    statuses = sweep(plan, out, _make_pool(arguments, out), arguments.data_dir)
    failed = sum(status.result is None for status in statuses)
    if failed:
        raise RunError(
            f"runs that have failed: {failed}. In the folder of each, failure.json says why, and "
            "output.txt, if it is there, has what was printed; the same command tries again"
        )


def _jobs(arguments: Namespace) -> int:
    from kernelnorm.experiments.runs import RunError
    from kernelnorm.experiments.sweep import default_jobs

    jobs: int = default_jobs(arguments.accelerator) if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        raise RunError(f"--jobs must be positive, got {jobs}")
    return jobs


def _make_pool(arguments: Namespace, out: Path) -> Pool:
    from kernelnorm.experiments.launch import Launch
    from kernelnorm.experiments.sweep import LocalPool
    from kernelnorm.experiments.sweep.cluster import RayPool

    launch = Launch(**where(arguments))
    if arguments.ray is None:
        return LocalPool(launch, _jobs(arguments))
    gpus, cpus = arguments.gpus_per_run, arguments.cpus_per_run
    return RayPool(launch, out, arguments.ray, gpus=gpus, cpus=cpus)
