"""Options and helpers that all tests share."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.oracle import Subject

if not torch.cuda.is_available():  # has to be known when Triton is imported, by whoever does
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests fill fresh memory with NaN by deterministic mode, for which cuBLAS wants this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# PyTorch keeps compiled graphs on disk, and does not notice that the operators have changed.
for cache in ("FX_GRAPH", "AUTOGRAD"):
    os.environ[f"TORCHINDUCTOR_{cache}_CACHE"] = "0"

pytest.register_assert_rewrite("tests.oracle", "tests.converting", "tests.small_runs")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the layers' tests run: cpu, cuda")
    parser.addoption(
        "--kernels", type=Path, help="C kernels to test in place of the installed ones"
    )
    parser.addoption("--seed", type=int, help="seed of each test, to repeat a failure")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Takes the C kernels from ``--kernels``, and fails if they cannot be loaded."""
    path = session.config.getoption("--kernels")
    if path is not None:
        from kernelnorm.ops.backends.cpu.library import library, load

        load(path.resolve())
        sys.modules[library.__module__].PATH = path.resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: as the last one, a long test would keep a single process busy."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Leaves what was imported out of garbage collections, of which each would take 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest) -> int:
    """Other random inputs in each run of a test; a failure shows their seed."""
    seed: int | None = request.config.getoption("--seed")
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    print(f"--seed {seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope="session", params=["cpu", "cpu in 3 threads", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Subject:
    """A backend with kernels of its own; see :mod:`tests.oracle`."""
    from kernelnorm.ops.backends.triton import device_functions
    from tests.oracle import DTYPES, Subject

    name = request.param.split()[0]
    if name == "cpu" and device.type != "cpu":
        pytest.skip("the C kernels are for CPUs")
    if name == "triton" and not device_functions.AVAILABLE:
        pytest.skip("Triton is not installed")
    subject = Subject(request.param, device)
    if not subject.supports(torch.ones(1, 1, 1, dtype=DTYPES[name][0], device=device)):
        pytest.skip(f"the backend {name} does not work here")
    return subject


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Set PyTorch's number of threads for a test; the order of sums depends on it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A noise that is far from the budget, and an account of few orders, both without waiting."""
    from kernelnorm.experiments import account, private_steps

    monkeypatch.setattr(private_steps, "noise_multiplier", lambda *_: 2.0)
    monkeypatch.setattr(account, "ORDERS", [*range(2, 64)])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are put together but not drawn, which takes most of a report's time."""
    from kernelnorm.experiments.report import figures

    monkeypatch.setattr(figures, "png", lambda _: b"a picture")
