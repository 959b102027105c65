"""The configuration of a run: a recipe with its choices made."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.paper import auto_lr
from kernelnorm.experiments.private_options import Privacy
from kernelnorm.experiments.recipes import NAMED_DATASETS, Recipe, plain_dataset
from kernelnorm.experiments.runs import Metrics
from kernelnorm.models import Rules, list_models
from kernelnorm.norms import NORMS, describe

__all__ = ["AGC", "OPTIMIZERS", "SCHEDULES", "RunConfig", "configure"]

AGC = 0.01
"""The default factor of adaptive gradient clipping, for norms that need it."""

MAX_FLOAT = 3e38
"""The upper limit of learning rate, weight decay and warm-up: beyond it float32 overflows."""

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("steps", "cosine")

_PAPER = asdict(Rules())
"""The paper's rules for kernel networks."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Recipe):
    """A recipe with its choices made: everything that determines the trained weights.

    Two runs with equal configurations are the same run, so :attr:`name` names its folder.

    Args:
        norm: one of :data:`kernelnorm.norms.NORMS`.
        batch_size: images per step, over all processes together.
        lr: the learning rate at the start.
        seed: of the initial weights, the order of the images, augmentation and dropout.
        subset: train and test on that many images only, the classes balanced; ``None`` is all.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        init_from: the fingerprint of the weights that training starts from; empty: random ones.
        private: the options of private training; ``None``: training is not private.
        agc: the factor of adaptive gradient clipping; ``None``: the norm does not need it.
    """

    norm: str
    batch_size: int
    lr: float
    seed: int = 0
    subset: int | None = None
    precision: str = "32-true"
    init_from: str = ""
    private: Privacy | None = None
    agc: float | None = None

    def lr_at(self, epoch: float, step: float = 0.0) -> float:
        """Return the learning rate of a step.

        Args:
            epoch: the time at which the step begins, in epochs, from 0.
            step: the length of the step, in epochs.
        """
        lr = self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.lr_milestones)
        if self.schedule == "cosine":
            begun = max(0.0, epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            lr *= 0.5 * (1 + math.cos(math.pi * begun))
        if epoch < self.warmup_epochs:
            lr *= min(1.0, (epoch + step) / self.warmup_epochs)
        return lr

    def finished(self, history: Sequence[Metrics]) -> bool:
        """Tell whether training ends: all epochs are done, or it has converged.

        As in the paper, a run has converged if the training loss of each of the last five epochs is
        below 0.001. A private run does all its epochs, as its training loss is not private.
        """
        last = history[-5:] if self.private is None else ()
        converged = len(last) == 5 and all(metrics["train_loss"] < 1e-3 for metrics in last)
        return converged or len(history) >= self.epochs

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, with values of types that JSON and YAML have."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RunConfig:
        """Return the configuration with these fields; the inverse of :meth:`as_dict`.

        Raises:
            RunError: a field without a default value is missing, a field is unknown, or a value has
                the wrong type.
        """
        try:
            values = {**cls.defaults(), **record}
            private = values["private"]
            values["private"] = None if private is None else Privacy(**private)
            config = cls(**{**values, "lr_milestones": tuple(values["lr_milestones"])})
            for name, hint in get_type_hints(cls).items():
                if not _fits(getattr(config, name), hint):
                    raise TypeError(f"{name} is {getattr(config, name)!r}")
            return config
        except TypeError as error:
            raise RunError(
                f"the run's configuration is not of this version of kernelnorm: {error}"
            ) from error

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default values of the fields that have one, as in :meth:`as_dict`."""
        needed = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
        record = cls(**dict.fromkeys(needed)).as_dict()  # type: ignore[arg-type]
        return {name: value for name, value in record.items() if name not in needed}

    @property
    def name(self) -> str:
        """The name of the run's folder: norm, batch size, epsilon if private, seed, and a hash.

        The hash leaves out fields with their default value, so that a new field renames no folder.
        It also leaves out the path of a folder of images, as images may move.
        """
        defaults = self.defaults().items()
        chosen = {
            name: value for name, value in self.as_dict().items() if (name, value) not in defaults
        }
        if self.dataset not in NAMED_DATASETS:
            del chosen["dataset"]
        budget = ""
        if self.private is not None:
            chosen["private"] = self.private.changes
            budget = f"-eps{self.private.epsilon:g}"
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
        return f"{self.norm}-b{self.batch_size}{budget}-seed{self.seed}-{digest[:8]}"

    @property
    def variant(self) -> str:
        """The rules that differ from the paper's: ``"dropout_p=0, head=False"``, or ``""``."""
        rules = self.model_options.get("rules")
        if not isinstance(rules, dict):
            return ""
        return ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in sorted(rules.items())
        )


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value has the type of a field; numbers have to be finite."""
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint in (int, float):
        whole = type(value) is int
        return whole or (hint is float and type(value) is float and math.isfinite(value))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    return isinstance(value, get_origin(hint) or hint)


def configure(
    recipe: Recipe, *, norm: str, batch_size: int, lr: float | None = None, **choices: Any
) -> RunConfig:
    """Make a run's configuration from a recipe.

    Args:
        recipe: from :func:`recipe_for`.
        norm: one of :data:`kernelnorm.norms.NORMS`.
        batch_size: images per step.
        lr: the learning rate; ``None`` takes :func:`auto_lr`.
        choices: other fields of :class:`RunConfig`; they replace values of the recipe. ``agc`` is
            used for norms that need it only, where its default is 0.01.

    Raises:
        RunError: a value is out of its range, or the model does not have the norm.
    """
    if norm not in NORMS:
        raise RunError(f"unknown norm {norm!r}: choose from {', '.join(NORMS)}")
    if recipe.model not in list_models(norm):
        only_kernel = recipe.model not in list_models("batch")
        raise RunError(
            f"{recipe.model} exists with the norm kernel only, got {norm}: choose kernel, or "
            "another model"
            if only_kernel
            else f"{recipe.model} does not exist with the norm {norm}: choose another norm, or "
            f"one of the models {', '.join(list_models(norm))}"
        )
    values = {**asdict(recipe), **choices, "norm": norm, "batch_size": batch_size}
    values["dataset"] = plain_dataset(values["dataset"])
    if values["schedule"] == "cosine" and choices.get("lr_milestones"):
        raise RunError("--lr-milestones needs --schedule steps, got cosine: leave one out")
    steps = values["schedule"] == "steps"
    values["lr_milestones"] = tuple(values["lr_milestones"]) if steps else ()
    for name in ("batch_size", "epochs", "image_size", "subset"):
        value = values.get(name)
        if value is not None and value < 1:
            raise RunError(f"{name} must be positive, got {value}")
    for name in ("weight_decay", "warmup_epochs"):
        if not 0 <= values[name] <= MAX_FLOAT:
            option = f"--{name.replace('_', '-')}"
            raise RunError(f"{option} must be between 0 and {MAX_FLOAT:g}, got {values[name]}")
    if given := {"norm", "num_classes", "in_channels"} & {*values["model_options"]}:
        raise RunError(
            f"model_options cannot set {', '.join(sorted(given))}: the norm and the data set do"
        )
    for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if values[name] not in allowed:
            raise RunError(f"{name} must be one of {', '.join(allowed)}, got {values[name]!r}")
    if values["warmup_epochs"] and values["warmup_epochs"] >= values["epochs"]:
        raise RunError(
            f"--warmup-epochs must be less than --epochs, got {values['warmup_epochs']:g} of "
            f"{values['epochs']}"
        )
    if values.get("private") is not None:
        values["private"].check(
            norm=norm, precision=values.get("precision", "32-true"), augment=values["augment"]
        )
    values["model_options"] = _model_options(values["model_options"])
    values["agc"] = _agc(norm, values.get("agc"), values.get("precision"))
    if not 0 <= values.get("seed", 0) < 1 << 32:  # PyTorch takes larger ones modulo 2**32
        raise RunError(f"seed must be between 0 and 2**32 - 1, got {values['seed']}")
    if lr is None:
        lr = auto_lr(recipe, norm, batch_size, values["optimizer"]).lr
    if not 0 < lr <= MAX_FLOAT:
        raise RunError(f"the learning rate must be positive, at most {MAX_FLOAT:g}, got {lr}")
    numbers = {name: float(values[name]) for name in ("weight_decay", "warmup_epochs")}
    return RunConfig(**{**values, **numbers}, lr=float(lr))


def _model_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in the one form in which equal ones give the same name of a run's folder.

    Whole numbers are ints, and rules that are all the paper's are left out.
    """
    plain: dict[str, Any] = _whole(options)
    rules = plain.get("rules")
    if isinstance(rules, dict) and all(_PAPER.get(name) == value for name, value in rules.items()):
        del plain["rules"]
    return plain


def _whole(value: Any) -> Any:
    """Return a value with ints in place of whole floats, also in nested mappings and lists."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {name: _whole(item) for name, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _agc(norm: str, factor: float | None, precision: str | None) -> float | None:
    """Return the factor of adaptive gradient clipping; ``None`` if the norm does not need it."""
    if factor is not None and not 0 < factor < math.inf:
        raise RunError(f"agc must be positive, got {factor}")
    if "agc" not in describe(norm).needs:
        return None
    if precision == "16-mixed":
        raise RunError(
            f"norm {norm} needs adaptive gradient clipping, which the scaled gradients of 16-mixed "
            "do not allow: choose --precision bf16-mixed or 32-true"
        )
    return AGC if factor is None else factor
