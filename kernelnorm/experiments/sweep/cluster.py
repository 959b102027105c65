"""Runs as Ray tasks, on the machines of a cluster."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from concurrent.futures import Future
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.errors import RunError, to_install
from kernelnorm.experiments.files import write_atomically
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.sweep.execute import COMPILE_THREADS, execute

__all__ = ["RayPool"]

_RECORD = ("config.yaml", "failure.json", "metrics.jsonl")
_CHECKPOINTS = ("best.ckpt", "last.ckpt")
_RETRIES = 3


class RayPool:
    """The machines of a Ray cluster. If a machine is lost, its runs start again on others.

    Machines that see the sweep's folder, on a shared file system, train a run in its own folder,
    and resume it from its last checkpoint. Other machines train it in a temporary folder: the run's
    files are copied there before it starts, and back when it ends.

    Args:
        launch: how runs are executed; its ``out`` is replaced.
        root: the folder of the runs' folders.
        address: ``"HOST:PORT"`` of the cluster; ``"auto"``: the cluster on this machine;
            ``"local"``: start a cluster of this machine alone.
        gpus: GPUs per run, may be a fraction; ``None``: 0.25 if the cluster has GPUs and
            ``launch`` does not ask for the CPU, else 0.
        cpus: CPU cores per run, which is also its number of threads.

    Raises:
        RunError: Ray is not installed, there is no such cluster, no machine has enough CPUs or GPUs
            for a run, or an argument is out of range.
    """

    def __init__(
        self, launch: Launch, root: Path, address: str, *, gpus: float | None = None, cpus: int = 1
    ) -> None:
        if find_spec("ray") is None:
            raise RunError(f"--ray needs: {to_install('cluster')}")
        if address not in ("auto", "local") and ":" not in address:
            raise RunError(
                f"--ray {address}: an address is auto, local or HOST:PORT. Write --ray=ADDRESS, "
                "or put the case before --ray"
            )
        if cpus < 1:
            raise RunError(f"--cpus-per-run must be positive, got {cpus}")
        if gpus is not None and gpus < 0:
            raise RunError(f"--gpus-per-run must not be negative, got {gpus:g}")
        ray: Any = import_module("ray")  # an extra, whose types are not always there
        self._ray = ray
        try:
            if ":" in address:  # Ray itself would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(f"--ray {address}: {error}") from error
        if gpus is None:
            has_gpus = launch.accelerator != "cpu" and ray.cluster_resources().get("GPU", 0)
            gpus = 0.25 if has_gpus else 0.0
        self._needs = {"CPU": cpus, "GPU": gpus}
        if not self.places:
            ray.shutdown()
            raise RunError(
                f"no machine of the cluster has {cpus} CPUs and {gpus:g} GPUs for a run: change "
                "--cpus-per-run or --gpus-per-run"
            )
        self._launch = replace(launch, data_dir=launch.data_dir.resolve())
        self._task = ray.remote(_run).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_retries=_RETRIES,
            runtime_env={"env_vars": {COMPILE_THREADS: os.environ.get(COMPILE_THREADS, str(cpus))}},
        )
        # Machines on which this file exists see the sweep's folder.
        self._mark = root.resolve() / f".sweep-{secrets.token_hex(8)}"
        write_atomically(self._mark, b"")

    @property
    def places(self) -> int:
        """How many runs the machines that the cluster has now can execute in parallel."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(
            min(int(node.get(name, 0) / need) for name, need in self._needs.items() if need)
            for node in nodes
        )

    def submit(self, config: RunConfig, out: Path) -> Future[str]:
        """Start a run.

        Args:
            config: the run's configuration.
            out: the run's folder.

        Returns:
            a future of the result of :func:`execute`.
        """
        threads = int(self._needs["CPU"])
        there = _read(out, (*_RECORD, *_CHECKPOINTS))
        task = self._task.remote(config, self._launch, out.resolve(), threads, self._mark, there)
        future: Future[str] = Future()

        def end(done: Future[tuple[str, dict[str, bytes]]]) -> None:
            try:
                message, files = done.result()
                _write(out, files)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(message)

        task.future().add_done_callback(end)
        return future

    def close(self) -> None:
        """Leave the cluster, which ends the runs that are in progress."""
        self._ray.shutdown()
        self._mark.unlink(missing_ok=True)


def _run(
    config: RunConfig,
    launch: Launch,
    out: Path,
    threads: int,
    mark: Path,
    there: dict[str, bytes],
) -> tuple[str, dict[str, bytes]]:
    """Execute a run on a machine of the cluster; return its error message, and its files."""
    torch.set_num_threads(threads)
    if mark.exists():
        message = execute(config, launch, out)
        # A network file system may show the files late, so they are sent; but not if another
        # process is training in the folder by now.
        return message, {} if RunFolder(out).is_locked() else _read(out, _RECORD)
    with TemporaryDirectory() as folder:
        here = Path(folder) / config.name
        _write(here, there)
        message = execute(config, launch, here)
        return message, _read(here, (*_CHECKPOINTS, *_RECORD))


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the contents of the files that exist, in this order."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write a run's files, in this order; remove an old ``failure.json`` if there is no new one."""
    if files and "failure.json" not in files:
        (folder / "failure.json").unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
