"""Trains several runs at a time on this machine, in processes that are used again."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tqdm import tqdm

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.launch import Launch, make_fabric
from kernelnorm.experiments.sweep.execute import execute

__all__ = ["LocalPool", "cores", "default_jobs"]

_BYTES_PER_RUN = 8 * 2**30


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_jobs(accelerator: str) -> int:
    """Return how many runs to have at a time: on CPUs one for each core; on CUDA one for each 8 GiB
    of the memory that is free, but no more than cores; elsewhere one.
    """
    device = make_fabric(accelerator).device
    if device.type == "cpu":
        return cores()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, min(cores(), free // _BYTES_PER_RUN))
    return 1


class LocalPool:
    """Processes that train, each one run after the other.

    Each is a pool of its own: if one dies, its run alone is lost, and the next run gets a new one.
    They end when this process ends, in whichever way.

    Args:
        launch: how runs are executed; its ``out`` is replaced.
        jobs: how many processes; each has as many threads as there are cores for it.
    """

    def __init__(self, launch: Launch, jobs: int) -> None:
        self.launch, self.places = launch, jobs
        self._workers: list[_Worker] = []

    def submit(self, config: RunConfig, out: Path) -> Future[str]:
        """Begin a run in a process that has none; there must be one.

        Args:
            config: the run.
            out: its folder.

        Returns:
            what :func:`execute` returns.
        """
        worker = next((worker for worker in self._workers if not worker.is_busy), None)
        if worker is None:
            worker = _Worker(max(1, cores() // self.places))
            self._workers.append(worker)
        try:
            return worker.submit(config, self.launch, out)
        except BrokenExecutor:  # it has died
            worker.close()
            self._workers.remove(worker)
            return self.submit(config, out)

    def close(self) -> None:
        """End the processes; those that train are not waited for."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """A process, and the pipe that it hangs on: where that is closed, the process ends at once."""

    def __init__(self, threads: int) -> None:
        context = get_context("spawn")
        reader, self._leash = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            1, mp_context=context, initializer=_begin, initargs=(reader, threads)
        )
        self._threads = threads
        self._future: Future[str] | None = None

    @property
    def is_busy(self) -> bool:
        return self._future is not None and not self._future.done()

    def submit(self, config: RunConfig, launch: Launch, out: Path) -> Future[str]:
        # The first time, it starts the process, which inherits both.
        with _no_interrupts(), _compile_threads(self._threads):
            self._future = self._pool.submit(_run, config, launch, out)
        return self._future

    def close(self) -> None:
        if self.is_busy:
            self._leash.close()
        self._pool.shutdown()
        self._leash.close()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C: it is for the first process to decide what it means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _compile_threads(threads: int) -> Iterator[None]:
    """Let a process that starts here compile with so many processes of its own.

    By default it starts one per core, and each takes half a gigabyte: too much for many runs.
    """
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(threads)
    try:
        yield
    finally:
        del os.environ[name]


def _begin(leash: Connection, threads: int) -> None:
    """Prepare a process, when it is started."""

    def watch() -> None:
        with suppress(EOFError, OSError):
            leash.recv()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is killed
    torch.set_num_threads(threads)


def _run(config: RunConfig, launch: Launch, out: Path) -> str:
    """Execute a run; what the process prints goes to ``output.txt`` in the run's folder."""
    file = out / "output.txt"
    with suppress(OSError):  # the run itself will say it better
        out.mkdir(parents=True, exist_ok=True)
        with file.open("w") as stream:
            os.dup2(stream.fileno(), sys.stdout.fileno())
            os.dup2(stream.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    message = execute(config, launch, out)
    sys.stdout.flush()
    sys.stderr.flush()
    if file.exists() and not file.stat().st_size:
        file.unlink()
    return message
