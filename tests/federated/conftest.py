"""A small run of the app in examples/federated, and the app's folder on the path."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).parent.parent.parent
APP = ROOT / "examples" / "federated"
sys.path.insert(0, str(APP))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Typer, about Click
    import flwr.serverapp

from kernelnorm_federated.settings import Settings  # noqa: E402

assert flwr.serverapp  # imported for its warnings only

SMALL = {
    "width": 0.125,
    "clients": 3,
    "num-server-rounds": 3,
    "train-images": 90,
    "test-images": 40,
    "batch-size": 16,
    "timeout": 5.0,
}


@pytest.fixture
def run_config(tmp_path: Path) -> dict[str, Any]:
    """The app's default configuration, made small."""
    app = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    return {**app["config"], **SMALL, "out": str(tmp_path / "run")}


@pytest.fixture
def settings(run_config: dict[str, Any]) -> Callable[..., Settings]:
    """Make settings of a small run with some other values."""

    def make(**values: Any) -> Settings:
        changes = {name.replace("_", "-"): value for name, value in values.items()}
        return Settings.from_run_config({**run_config, **changes})

    return make
