"""Options and helpers that all tests share."""

from __future__ import annotations

import os
import random

import pytest
import torch

if not torch.cuda.is_available():  # has to be known when Triton is imported, by whoever does
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the layers' tests run: cpu, cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    """Other random inputs in each run of a test; a failure shows their seed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
