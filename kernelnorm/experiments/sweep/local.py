"""Trains several runs in parallel on this machine, in processes that train run after run."""

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
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.sweep.execute import COMPILE_THREADS, execute

__all__ = ["LocalPool", "cores", "default_jobs"]

_BYTES_PER_RUN = 8 * 2**30


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_jobs(accelerator: str) -> int:
    """Return how many runs to execute in parallel: on CPUs one for each core; on CUDA one for each
    8 GiB of free GPU memory, at least one and at most one for each core; elsewhere one.
    """
    device = make_fabric(accelerator).device
    if device.type == "cpu":
        return cores()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, min(cores(), free // _BYTES_PER_RUN))
    return 1


class LocalPool:
    """Worker processes, each of which trains one run after another.

    If a worker dies, only its run is lost, and the next run gets a new worker. The workers end when
    this process ends, even if it is killed.

    Args:
        launch: how runs are executed; its ``out`` is replaced.
        jobs: the number of workers; each has ``cores() // jobs`` threads, at least one.
    """

    def __init__(self, launch: Launch, jobs: int) -> None:
        self.launch, self.places = launch, jobs
        self._workers: list[_Worker] = []

    def submit(self, config: RunConfig, out: Path) -> Future[str]:
        """Start a run in an idle worker, or in a new one; the caller limits the number of runs.

        Args:
            config: the run's configuration.
            out: the run's folder.

        Returns:
            a future of the result of :func:`execute`.
        """
        worker = next((worker for worker in self._workers if not worker.is_busy), None)
        if worker is None:
            worker = _Worker(max(1, cores() // self.places))
            self._workers.append(worker)
        try:
            return worker.submit(config, self.launch, out)
        except BrokenExecutor:  # the worker has died
            worker.close()
            self._workers.remove(worker)
            return self.submit(config, out)

    def close(self) -> None:
        """End the workers, without waiting for their runs."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """A worker process. It ends at once when this process closes the pipe ``_leash``, or dies."""

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
        # The first call starts the process, which inherits both settings.
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
    """Ignore Ctrl-C; a worker that starts here inherits that, so only this process handles it."""
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
    """Let a process that starts here compile with ``threads`` processes of its own."""
    if COMPILE_THREADS in os.environ:
        yield
        return
    os.environ[COMPILE_THREADS] = str(threads)
    try:
        yield
    finally:
        del os.environ[COMPILE_THREADS]


def _begin(leash: Connection, threads: int) -> None:
    """Prepare a new worker: end it with the pipe, and limit its threads."""

    def watch() -> None:
        with suppress(EOFError, OSError):
            leash.recv()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # tqdm's own outlives a process that is killed
    torch.set_num_threads(threads)


def _run(config: RunConfig, launch: Launch, out: Path) -> str:
    """Execute a run; what the process prints goes to the end of ``output.txt`` in its folder.

    Another sweep may be training the run, and printing to the same file.
    """
    file = out / "output.txt"
    with suppress(OSError):  # the run itself reports it better
        out.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            os.dup2(stream.fileno(), sys.stdout.fileno())
            os.dup2(stream.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    message = execute(config, launch, out)
    sys.stdout.flush()
    sys.stderr.flush()
    if file.exists() and not file.stat().st_size and not RunFolder(out).is_locked():
        file.unlink()
    return message
