"""Options and helpers that all tests share."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # has to be known when Triton is imported, by whoever does
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests fill fresh memory with NaN by deterministic mode, for which cuBLAS wants this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the layers' tests run: cpu, cuda")
    parser.addoption(
        "--kernels", type=Path, help="C kernels to test in place of the installed ones"
    )


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
def fresh_seed() -> None:
    """Other random inputs in each run of a test; a failure shows their seed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads for a test; the order of sums depends on it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
