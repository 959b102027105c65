"""A sweep on a real Ray cluster of two nodes, which are processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.sweep.cluster import RayPool
from kernelnorm.experiments.sweep.execute import COMPILE_THREADS, execute
from tests.processes import wait_for
from tests.test_sweep import LAUNCH, SMALL, small, without_times

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # what Ray will do, without its warning
pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 10**8}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core, for all tests: starting and ending them takes half a minute."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def one_thread(set_threads: Callable[[int], None]) -> None:
    """As a run has that is given one CPU."""
    set_threads(1)


@pytest.mark.usefixtures("one_thread")
def test_on_machines_that_do_not_see_the_folder(cluster: Any, tmp_path: Path) -> None:
    (config,) = small(norms=["batch"])
    (fails,) = small(norms=["instance"])
    out, here = tmp_path / "sweep" / config.name, tmp_path / "here" / config.name
    pool = RayPool(LAUNCH, out.parent, cluster.address)
    try:
        assert pool.places == 2
        next(out.parent.glob(".sweep-*")).unlink()  # what a machine must see
        assert pool.submit(config, out).result(timeout=60) == ""
        message = pool.submit(fails, out.parent / fails.name).result(timeout=60)
    finally:
        pool.close()
    assert execute(config, LAUNCH, here) == ""
    assert without_times(out.parent)[config.name] == without_times(here.parent)[config.name]
    assert {file.name for file in out.iterdir()} == {
        *("best.ckpt", "config.yaml", "last.ckpt", "metrics.jsonl")
    }
    assert message.startswith("vgg8 with norm instance cannot train on")
    failure = RunFolder(out.parent / fails.name).read_failure()
    assert failure == {"kind": "failed", "message": message}


def test_a_run_compiles_with_as_many_processes_as_it_has_threads(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(*_: Any) -> tuple[str, dict[str, bytes]]:
        import torch._inductor.config as compiler

        return str(compiler.compile_threads), {}

    monkeypatch.delenv(COMPILE_THREADS, raising=False)
    monkeypatch.setattr("kernelnorm.experiments.sweep.cluster._run", report)
    (config,) = small(norms=["batch"])
    pool = RayPool(LAUNCH, tmp_path, cluster.address)
    try:
        assert pool.submit(config, tmp_path / config.name).result(timeout=60) == "1"
    finally:
        pool.close()


@pytest.mark.usefixtures("one_thread")
def test_what_is_there_goes_to_the_machine_and_comes_back(tmp_path: Path) -> None:
    from kernelnorm.experiments.sweep import cluster

    (config,) = small(norms=["batch"], epochs=4)
    folder = RunFolder(tmp_path / "begun")
    whole = tmp_path / "whole"
    assert execute(config, replace(LAUNCH, max_steps=11), folder.path) == ""
    folder.write_failure("failed", "no memory", config.as_dict())
    there = cluster._read(folder.path, ("config.yaml", "failure.json", "last.ckpt"))
    nowhere = tmp_path / "nowhere"
    message, files = cluster._run(config, LAUNCH, nowhere, 1, nowhere, there)
    cluster._write(folder.path, files)
    assert message == ""
    assert not nowhere.exists()
    assert folder.read_failure() is None
    assert execute(config, LAUNCH, whole) == ""
    assert without_times(tmp_path)["begun"] == without_times(tmp_path)["whole"]


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        (None, {"gpus": 2}, "no machine of the cluster has 1 CPUs and 2 GPUs for a run"),
        ("127.0.0.1:1", {}, "--ray 127.0.0.1:1: "),
    ],
)
def test_impossible_clusters_are_errors(
    address: str | None, options: dict[str, Any], message: str, cluster: Any, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message):
        RayPool(LAUNCH, tmp_path, address or cluster.address, **options)


@pytest.mark.usefixtures("one_thread")
def test_every_run_ends_though_the_sweep_is_killed_and_a_node_is_lost(
    cluster: Any, tmp_path: Path
) -> None:
    """The last test, since the cluster keeps one node."""
    configs = small(seeds=[0, 1], epochs=40)
    options = ["--norms=batch,layer", "--batch-sizes=8", "--seeds=0,1", "--epochs=40"]
    out = f"--out={tmp_path / 'cluster'}"
    command = [sys.executable, "-m", "kernelnorm", "sweep", *SMALL, *options, out]
    command.append(f"--ray={cluster.address}")
    folders = [RunFolder(tmp_path / "cluster" / config.name) for config in configs]

    def in_progress(last_epoch: int = 39) -> int:
        lengths = [len(folder.read_metrics()) for folder in folders]
        return sum(0 < length <= last_epoch for length in lengths)

    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: in_progress(last_epoch=30) == 2)  # far from their end
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    wait_for(lambda: not any(folder.is_locked() for folder in folders))
    assert in_progress() == 2  # the tasks have ended with the sweep

    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: sum(folder.is_locked() for folder in folders) == 2)  # one on each node
    cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count(" done ") == len(configs)

    for config in configs:
        assert execute(config, LAUNCH, tmp_path / "here" / config.name) == ""
    assert without_times(tmp_path / "cluster") == without_times(tmp_path / "here")
