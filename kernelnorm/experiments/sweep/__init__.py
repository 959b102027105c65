"""Sweeps: train the missing runs of a plan, several in parallel.

A sweep stores nothing but its runs' folders. If it is stopped and started again, it reads these
folders, asks the plan which runs are wanted, and trains the missing ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.inputs import ImageCheck, load_split
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.status import Status, read_status
from kernelnorm.experiments.sweep.grid import make_grid
from kernelnorm.experiments.sweep.local import LocalPool, default_jobs
from kernelnorm.experiments.sweep.plan import Grid, Plan
from kernelnorm.experiments.sweep.reproduction import reproduction
from kernelnorm.experiments.sweep.view import View, forecast, table

__all__ = [
    "Grid",
    "LocalPool",
    "Plan",
    "Pool",
    "Status",
    "default_jobs",
    "dry_run",
    "make_grid",
    "reproduction",
    "sweep",
]


class Pool(Protocol):
    """Where runs are executed."""

    @property
    def places(self) -> int:
        """How many runs can be executed in parallel."""

    def submit(self, config: RunConfig, out: Path) -> Future[str]:
        """Start a run; the result is its error message, or empty."""

    def close(self) -> None:
        """Stop the runs in progress, and release the processes or machines."""


class _Survey:
    """The statuses of a plan's runs; runs that have ended are not read again.

    Args:
        plan: the plan.
        root: the folder of the runs' folders.
    """

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan, self.root = plan, root
        self._ended: dict[str, Status] = {}
        self._failed: dict[str, Status] = {}

    def look(self, config: RunConfig) -> Status:
        """Return the status of a run."""
        name = config.name
        if name in self._ended:
            return self._ended[name]
        try:
            status = read_status(RunFolder(self.root / name), config)
        except RunError as error:  # a file is damaged
            status = Status(config, "failed", message=str(error))
        if status.result is not None:
            self._ended[name] = status
        elif name in self._failed and status.state != "running":
            return self._failed[name]
        return status

    def result(self, config: RunConfig) -> float | None:
        """Return a run's result, if it has ended."""
        return self.look(config).result

    def statuses(self) -> list[Status]:
        """Return the status of each run that is wanted so far."""
        return [self.look(config) for config in self.plan.runs(self.result)]

    def check_images(self, data_dir: Path) -> None:
        """Check that the runs that have ended were trained on the images of the plan.

        Raises:
            DataError: images are missing or damaged.
            RunError: a run is of other images.
        """
        check = ImageCheck(data_dir)
        for status in self.statuses():
            if status.result is not None:
                check(RunFolder(self.root / status.config.name), status.config)

    def end(self, config: RunConfig, future: Future[str]) -> Status:
        """Record the end of a run, and return its status."""
        folder = RunFolder(self.root / config.name)
        error = future.exception()
        message = future.result() if error is None else f"its process was lost: {error}"
        if error is not None:
            with suppress(RunError):
                folder.write_failure("failed", message, config.as_dict())
        status = self.look(config)
        if status.result is None and status.state != "running":
            self._failed[config.name] = replace(status, state="failed", message=message)
        return self.look(config)


def dry_run(plan: Plan, root: Path, jobs: int, data_dir: Path = Path("data")) -> None:
    """Print the runs that are wanted, with their states, and estimate the time they will take.

    Args:
        plan: the plan.
        root: the folder of the runs' folders.
        jobs: how many runs would be executed in parallel.
        data_dir: the folder of the data.

    Raises:
        DataError: images of runs that have ended are missing or damaged.
        RunError: a run that has ended is of other images.
    """
    survey = _Survey(plan, root)
    survey.check_images(data_dir)
    statuses = survey.statuses()
    missing = [status for status in statuses if status.result is None]
    print("\n".join(table(statuses, plan.note)))
    time_needed = forecast(statuses, missing, jobs)
    print(f"\nTo be trained in {root}: {len(missing)} of {len(statuses)} runs, {jobs} at a time.")
    print(f"Time for them: {time_needed}, estimated from the epochs trained so far.")
    fewest, most = plan.extent(survey.result)
    if most > len(statuses):
        number = str(most) if fewest == most else f"{fewest} to {most}"
        print(f"As their results decide what comes next, there will be {number} runs in the end.")


def sweep(plan: Plan, root: Path, pool: Pool, data_dir: Path) -> list[Status]:
    """Train what is missing or failed, and print a table of all runs.

    A run that diverges has its result. If a run fails, the others go on, and the next sweep in the
    same folder tries it again. The sweep waits for runs that another process trains.

    Args:
        plan: the plan.
        root: the folder of the runs' folders.
        pool: where runs are executed; it is closed at the end.
        data_dir: the folder of the data; missing data is downloaded before the first run.

    Returns:
        the status of each run.

    Raises:
        DataError: images are missing or damaged.
        RunError: a run that has ended is of other images.
    """
    survey = _Survey(plan, root)
    with closing(pool):
        survey.check_images(data_dir)
        _prepare([status.config for status in survey.statuses() if status.result is None], data_dir)
        try:
            _run_all(survey, pool)
        finally:
            pool.close()  # first stop all runs, so that the table shows their final states
            statuses = survey.statuses()
            print("\n".join(["", *table(statuses, plan.note)]))
            for status in statuses:
                if status.state == "failed":
                    print(f"{status.config.name}: {status.message}")
            print(f"\nThe runs are in {root}.", flush=True)
    return statuses


def _prepare(configs: Sequence[RunConfig], data_dir: Path) -> None:
    """Download and decode images before the first run, so that parallel runs need not do it."""
    for config in {(config.dataset, config.image_size): config for config in configs}.values():
        load_split(config, "train", data_dir)
        load_split(config, "test", data_dir)


def _run_all(survey: _Survey, pool: Pool) -> None:
    in_flight: dict[Future[str], RunConfig] = {}
    tried: set[str] = set()
    ended: list[Status] = []
    view = View(survey.plan.note, max(1, pool.places))
    try:
        while True:
            statuses, places = survey.statuses(), pool.places  # each call may ask a cluster
            wanted = [
                status.config
                for status in statuses
                if status.state in ("missing", "unfinished", "failed")
                and status.config.name not in tried
            ]
            for config in wanted[: max(0, places - len(in_flight))]:
                in_flight[pool.submit(config, survey.root / config.name)] = config
                tried.add(config.name)
            running = {config.name for config in in_flight.values()}
            statuses = [
                replace(status, state="running") if status.config.name in running else status
                for status in statuses
            ]
            view.show(statuses, ended)
            waits = wanted and not places  # until machines of a cluster come back
            if not waits and not any(status.state == "running" for status in statuses):
                return
            ended = []
            if in_flight:
                finished, _ = wait(in_flight, timeout=3, return_when=FIRST_COMPLETED)
                ended = [survey.end(in_flight.pop(future), future) for future in finished]
                tried -= {status.config.name for status in ended if status.state == "running"}
            else:  # another process trains the missing runs, or the cluster has no machine
                time.sleep(1)
    finally:
        view.close()
