"""The run configuration of the app, checked before any work is done."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kernelnorm.experiments.data import DATASETS
from kernelnorm.models import list_models
from kernelnorm.norms import NORMS

FROZEN = "fixbn"
"""The norm whose BatchNorm statistics are frozen after some rounds."""
PARTITIONS = ("even", "dirichlet", "classes")
STRATEGIES = ("fedavg", "fedprox", "fedadam")
MAY_CHANGE = ("num_server_rounds", "timeout", "out", "data", "data_dir")
"""Fields that may change when a run is resumed: its length, its timeout and its folders."""
TESTED = ("test", "held-out")
_ZERO_ALLOWED = ("fixbn_round", "image_size", "train_images", "test_images", "seed")


class SettingError(ValueError):
    """A key of the run configuration has a value that cannot be used."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        super().__init__(f"run-config {key}={value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of ``[tool.flwr.app.config]`` in pyproject.toml, where comments explain them.

    Raises:
        SettingError: a value is out of its range or contradicts another one.
    """

    model: str
    width: float
    norm: str
    fixbn_round: int
    data: str
    data_dir: str
    image_size: int
    train_images: int
    test_images: int
    test_on: str
    clients: int
    partition: str
    alpha: float
    classes_per_client: int
    fraction_train: float
    local_epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    strategy: str
    proximal_mu: float
    server_learning_rate: float
    num_server_rounds: int
    seed: int
    timeout: float
    out: str

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Settings:
        """Return the settings in a Flower run configuration.

        Raises:
            SettingError: a key is missing or unknown, or has a value of a wrong type or out of its
                range.
        """
        types = {_key(field.name): field.type for field in fields(cls)}
        for key in run_config:
            if key not in types:
                raise SettingError(key, run_config[key], f"one of the keys {', '.join(types)}")
        values: dict[str, Any] = {}
        for key, kind in types.items():
            if key not in run_config:
                raise SettingError(key, None, f"a value of type {kind}")
            values[key.replace("-", "_")] = _typed(key, run_config[key], str(kind))
        return cls(**values)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < (name not in _ZERO_ALLOWED):
                least = "0 or more" if name in _ZERO_ALLOWED else "1 or more"
                raise SettingError(_key(name), value, least)
        if self.seed >= 1 << 63:
            raise SettingError("seed", self.seed, "less than 2**63")
        self._check_network()
        self._check_data()
        self._check_training()

    def _check_network(self) -> None:
        if self.norm not in (*NORMS, FROZEN):
            raise SettingError("norm", self.norm, f"one of {', '.join((*NORMS, FROZEN))}")
        models = list_models(self.layers)
        if self.model not in models:
            raise SettingError("model", self.model, f"with norm {self.norm}, {', '.join(models)}")
        _positive("width", self.width)

    def _check_data(self) -> None:
        if self.data == "digits":
            pass
        elif self.data in DATASETS:
            if not Path(self.data_dir).expanduser().is_absolute():
                raise SettingError("data-dir", self.data_dir, f"the absolute path of {self.data}")
        elif not Path(self.data).expanduser().is_absolute():
            names = ", ".join(("digits", *DATASETS))
            raise SettingError("data", self.data, f"{names}, or the absolute path of a folder")
        if self.test_on not in TESTED:
            raise SettingError("test-on", self.test_on, f"one of {', '.join(TESTED)}")
        for name in ("train_images", "test_images"):
            if self.test_on == "held-out" and not getattr(self, name):
                expected = "a number of images: test-on='held-out' tests on the rest"
                raise SettingError(_key(name), 0, expected)
        if self.partition not in PARTITIONS:
            raise SettingError("partition", self.partition, f"one of {', '.join(PARTITIONS)}")
        _positive("alpha", self.alpha)

    def _check_training(self) -> None:
        if self.strategy not in STRATEGIES:
            raise SettingError("strategy", self.strategy, f"one of {', '.join(STRATEGIES)}")
        if not 0 < self.fraction_train <= 1:
            raise SettingError("fraction-train", self.fraction_train, "above 0, at most 1")
        if not 0 <= self.momentum < 1:
            raise SettingError("momentum", self.momentum, "0 or more, below 1")
        if not (self.proximal_mu >= 0 and math.isfinite(self.proximal_mu)):
            raise SettingError("proximal-mu", self.proximal_mu, "0 or more")
        for name in ("learning_rate", "server_learning_rate", "timeout"):
            _positive(_key(name), getattr(self, name))
        if self.out and not Path(self.out).expanduser().is_absolute():
            expected = "an absolute path: Flower's processes run in other folders"
            raise SettingError("out", self.out, expected)
        if self.norm == FROZEN:
            self._check_frozen_rounds()

    def _check_frozen_rounds(self) -> None:
        """Refuse statistics that are frozen from the start, and those that never are."""
        last = self.num_server_rounds
        if last < 2:
            raise SettingError("num-server-rounds", last, f"at least 2 with norm {FROZEN}")
        if self.fixbn_round and not 1 < self.fixbn_round <= last:
            expected = f"from 2 to {last}, the number of rounds; or 0, after half of them"
            raise SettingError("fixbn-round", self.fixbn_round, expected)

    @property
    def layers(self) -> str:
        """The norm that the network is built with."""
        return "batch" if self.norm == FROZEN else self.norm

    @property
    def first_frozen_round(self) -> int | None:
        """The first round with frozen statistics, counted from 1; ``None`` without FixBN."""
        if self.norm != FROZEN:
            return None
        return self.fixbn_round or self.num_server_rounds // 2 + 1

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that must not change when a run is resumed."""
        record = {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}
        return {**record, "fixbn_round": self.first_frozen_round}

    @property
    def folder(self) -> Path:
        """The folder of the run's state."""
        if self.out:
            return Path(self.out).expanduser()
        identity = {**self.identity, "data": self.data}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        home = Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser()
        return home / "kernelnorm-federated" / f"{self.norm}-{digest[:8]}"


def _key(name: str) -> str:
    """Return the key of a field in the run configuration."""
    return name.replace("_", "-")


def _typed(key: str, value: object, kind: str) -> object:
    """Return ``value`` as a ``kind``; an integer may stand for a float."""
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value).__name__ != kind:
        example = {"str": 'text in quotes, "..."', "int": "a whole number", "float": "a number"}
        raise SettingError(key, value, example[kind])
    return value


def _positive(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise SettingError(key, value, "above 0")
