"""The paper's case studies as recipes, and the configuration of a run made from one."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from kernelnorm.experiments.privacy import Privacy
from kernelnorm.experiments.runs import Metrics, RunError
from kernelnorm.models import list_models
from kernelnorm.norms import NORMS, describe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "AGC",
    "OPTIMIZERS",
    "RECIPES",
    "SCHEDULES",
    "AutoLR",
    "Recipe",
    "RunConfig",
    "auto_lr",
    "configure",
    "paper",
    "recipe_for",
]


AGC = 0.01
"""The default factor of adaptive gradient clipping, for norms that need it."""

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("steps", "cosine")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained on one dataset, whatever its normalisation and batch size.

    The loss is cross-entropy for all of them.

    Args:
        case: the name of the case study, for people and for folders.
        dataset: ``"digits"``, ``"cifar10"``, ``"imagenette"``, ``"imagewoof"``, or a folder with
            ``train/<class>/*`` and ``val/<class>/*`` or ``test/<class>/*``.
        model: one of :func:`kernelnorm.models.list_models`.
        model_options: further keyword arguments of the model.
        image_size: height and width that images are brought to; ``None`` keeps the dataset's.
        epochs: the most epochs; training stops before when it has converged.
        augment: random crop and horizontal flip of the training images.
        standardise: subtract a mean and divide by a deviation per colour. It applies to every
            normalisation except ``"kernel"``, whose first layer does it by itself (Section 5).
        optimizer: ``"sgd"`` (the paper's) or ``"adamw"``.
        momentum: of SGD.
        weight_decay: of the optimizer.
        schedule: ``"steps"`` (the paper's, by ``lr_milestones``), or ``"cosine"``: the learning
            rate falls along half a cosine to zero at the last epoch.
        lr_milestones: after that many epochs the learning rate is multiplied by 0.1.
        warmup_epochs: in that many epochs at the start the learning rate rises linearly.
        lr_table: the case study in whose part of Table 4 ``--lr auto`` looks.
    """

    case: str
    dataset: str
    model: str
    model_options: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    epochs: int = 80
    augment: bool = False
    standardise: bool = False
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_milestones: tuple[int, ...] = ()
    lr_table: str
    optimizer: str = "sgd"
    schedule: str = "steps"
    warmup_epochs: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunConfig(Recipe):
    """A recipe with its choices made: everything that determines the trained weights.

    Two runs with equal configurations are the same run, so :attr:`name` names its folder.

    Args:
        norm: one of :data:`kernelnorm.norms.NORMS`.
        batch_size: images a step, over all processes together.
        lr: the learning rate at the start.
        seed: of the initial weights, the order of the images, augmentation and dropout.
        subset: train and test on that many images only, the classes balanced; ``None`` is all.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        init_from: the fingerprint of the weights that training starts from; empty: random ones.
        private: how it is trained with differential privacy, if it is.
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
        """Return the learning rate.

        Args:
            epoch: the time in epochs, from 0.
            step: how much of an epoch the step takes that begins then.
        """
        lr = self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.lr_milestones)
        if self.schedule == "cosine":
            begun = max(0.0, epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            lr *= 0.5 * (1 + math.cos(math.pi * begun))
        if epoch < self.warmup_epochs:
            lr *= min(1.0, (epoch + step) / self.warmup_epochs)
        return lr

    def finished(self, history: Sequence[Metrics]) -> bool:
        """Tell whether training ends here: all epochs done, or the paper's sign of convergence.

        A private run does all its epochs: the training loss is not private, so it decides nothing.
        """
        last = history[-5:] if self.private is None else ()
        converged = len(last) == 5 and all(metrics["train_loss"] < 1e-3 for metrics in last)
        return converged or len(history) >= self.epochs

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON and YAML know them."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RunConfig:
        """Return the configuration whose :meth:`record` this is.

        Raises:
            RunError: a field is missing that has no default value, or there is an unknown one.
        """
        try:
            values = {**cls.defaults(), **record}
            private = values["private"]
            values["private"] = None if private is None else Privacy(**private)
            return cls(**{**values, "lr_milestones": tuple(values["lr_milestones"])})
        except TypeError as error:
            raise RunError(
                f"the run's configuration is not of this version of kernelnorm: {error}"
            ) from error

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the part of :meth:`record` that has a default value, with that."""
        needed = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
        record = cls(**dict.fromkeys(needed)).record()  # type: ignore[arg-type]
        return {name: value for name, value in record.items() if name not in needed}

    @property
    def name(self) -> str:
        """The name of the run's folder: what people look for, and a hash of the fields.

        Fields with their default value are left out, so that one more field renames no folder. So
        is the place of a folder of images: they may move.
        """
        defaults = self.defaults().items()
        chosen = {
            name: value for name, value in self.record().items() if (name, value) not in defaults
        }
        if self.dataset not in _DATASETS:
            del chosen["dataset"]
        budget = ""
        if self.private is not None:
            chosen["private"] = self.private.changes
            budget = f"-eps{self.private.epsilon:g}"
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
        return f"{self.norm}-b{self.batch_size}{budget}-seed{self.seed}-{digest[:8]}"

    @property
    def variant(self) -> str:
        """What the run changes of the paper's rules: ``"dropout_p=0, head=False"``, or nothing."""
        rules = self.model_options.get("rules") or {}
        return ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in sorted(rules.items())
        )


CIFAR10 = Recipe(case="cifar10-vgg8", dataset="cifar10", model="vgg8", lr_table="cifar10-vgg8")
IMAGENETTE = Recipe(
    case="imagenette-densenet121",
    dataset="imagenette",
    model="densenet121",
    image_size=160,
    augment=True,
    standardise=True,
    lr_table="imagenette-densenet121",
)
IMAGEWOOF = Recipe(
    case="imagewoof-resnet18",
    dataset="imagewoof",
    model="resnet18",
    image_size=192,
    augment=True,
    standardise=True,
    weight_decay=1e-4,
    lr_milestones=(60,),
    lr_table="imagewoof-resnet18",
)
DIGITS = replace(  # our own, for a first look: a minute or two on any machine, no download
    CIFAR10,
    case="digits-vgg8",
    dataset="digits",
    model_options={"width": 0.25},
    image_size=16,  # VGG8 halves it three times
    epochs=8,
)
RECIPES = {recipe.case: recipe for recipe in (DIGITS, CIFAR10, IMAGENETTE, IMAGEWOOF)}
_DATASETS = {recipe.dataset for recipe in RECIPES.values()}
_FAMILIES = {
    "vgg": CIFAR10,
    "densenet": IMAGENETTE,
    "resnet": IMAGEWOOF,
    "knresnet": IMAGEWOOF,
    "efficientnet": IMAGEWOOF,
    "mobilenet": IMAGEWOOF,
}


def recipe_for(
    case: str | None = None, *, model: str | None = None, dataset: str | Path | None = None
) -> Recipe:
    """Return the recipe of a case study, or one for any model and dataset.

    A model without a case is trained by the recipe of the paper's case study with a network of its
    family: vgg by CIFAR-10-VGG8, densenet by Imagenette-DenseNet121, all others by
    Imagewoof-ResNet18.
    The images of a named dataset that is not the recipe's own keep their size.

    Raises:
        RunError: the case or the model is unknown, or there is a model but no dataset.
    """
    if model is not None and model not in list_models():
        raise RunError(f"unknown model {model!r}: choose from {', '.join(list_models())}")
    if case is not None and case not in RECIPES:
        raise RunError(f"unknown case {case!r}: choose from {', '.join(RECIPES)}")
    dataset = None if dataset is None else _plain(dataset)
    if case is None and model is None and dataset is None:
        return DIGITS
    if case is None and dataset is None:
        raise RunError(f"--model {model} needs --dataset (a folder or a name), or a case")
    if case is None:
        model = model or "resnet18"
        base = next(r for family, r in _FAMILIES.items() if model.startswith(family))
    else:
        base = RECIPES[case]
    if model in (None, base.model) and dataset in (None, base.dataset):
        return base
    model, dataset = model or base.model, dataset or base.dataset
    own_size = dataset in _DATASETS and dataset != base.dataset
    return replace(
        base,
        case=f"{Path(dataset).resolve().name}-{model}",
        dataset=dataset,
        model=model,
        model_options=base.model_options if model == base.model else {},
        image_size=None if own_size else base.image_size,
    )


def _plain(dataset: str | Path) -> str:
    """Return ``photos/`` as ``photos``; but ``./digits`` is a folder and not ``digits``."""
    plain = str(Path(dataset).expanduser())
    return str(dataset) if plain in _DATASETS else plain


def configure(
    recipe: Recipe, *, norm: str, batch_size: int, lr: float | None = None, **choices: Any
) -> RunConfig:
    """Make a run's configuration from a recipe.

    Args:
        recipe: from :func:`recipe_for`.
        norm: one of :data:`kernelnorm.norms.NORMS`.
        batch_size: images a step.
        lr: the learning rate; ``None`` takes :func:`auto_lr`.
        choices: other fields of :class:`RunConfig`; those of the recipe that are given replace it.
            ``agc`` counts for norms that need it, and is 0.01 there by default.

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
    values["dataset"] = _plain(values["dataset"])
    if values["schedule"] == "cosine" and choices.get("lr_milestones"):
        raise RunError("lr_milestones are those of the schedule 'steps', not of 'cosine'")
    steps = values["schedule"] == "steps"
    values["lr_milestones"] = tuple(values["lr_milestones"]) if steps else ()
    for name in ("batch_size", "epochs", "image_size", "subset"):
        value = values.get(name)
        if value is not None and value < 1:
            raise RunError(f"{name} must be positive, got {value}")
    for name in ("weight_decay", "warmup_epochs"):
        if not (values[name] >= 0 and math.isfinite(values[name])):
            raise RunError(f"{name} must not be negative, got {values[name]}")
    for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if values[name] not in allowed:
            raise RunError(f"{name} must be one of {', '.join(allowed)}, got {values[name]!r}")
    if values["warmup_epochs"] and values["warmup_epochs"] >= values["epochs"]:
        raise RunError(
            f"warmup_epochs must be fewer than epochs, got {values['warmup_epochs']:g} of "
            f"{values['epochs']}"
        )
    if values.get("private") is not None:
        values["private"].check(
            norm=norm, precision=values.get("precision", "32-true"), augment=values["augment"]
        )
    values["agc"] = _agc(norm, values.get("agc"), values.get("precision"))
    if not 0 <= values.get("seed", 0) < 1 << 63:
        raise RunError(f"seed must be between 0 and 2**63 - 1, got {values['seed']}")
    if lr is None:
        lr = auto_lr(recipe, norm, batch_size, values["optimizer"]).lr
    if not (lr > 0 and math.isfinite(lr)):
        raise RunError(f"the learning rate must be positive, got {lr}")
    return RunConfig(**values, lr=lr)


def _agc(norm: str, factor: float | None, precision: str | None) -> float | None:
    """Return the factor of adaptive gradient clipping, where the norm needs that."""
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


@cache
def paper() -> dict[str, Any]:
    """Return the paper's figures (``paper.toml``) by case study: accuracy, learning rate, time."""
    return tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8"))


class AutoLR(NamedTuple):
    """A learning rate, and where it comes from; ``exact``: it is the paper's for this case."""

    lr: float
    source: str
    exact: bool


def auto_lr(recipe: Recipe, norm: str, batch_size: int, optimizer: str = "sgd") -> AutoLR:
    r"""Return the learning rate of ``--lr auto``: the paper's (Table 4), or one made from it.

    A batch size that the table does not have takes the rate of the nearest one, in ratio, times
    :math:`(\text{batch size} / \text{nearest})^{0.75}`: of the exponents 0.5, 0.75 and 1 the one
    that is nearest to most columns of the table. A normalisation that it does not have takes the
    column of GroupNorm. AdamW takes PyTorch's default, 0.001.

    Example::

        >>> auto_lr(RECIPES["cifar10-vgg8"], "kernel", 32)
        AutoLR(lr=0.025, source='Table 4(a), KernelNorm, batch size 32', exact=True)
    """
    if optimizer == "adamw":
        return AutoLR(1e-3, "PyTorch's default for AdamW", exact=False)
    table = paper()[recipe.lr_table]["learning_rate"]
    row = min(table["rows"], key=lambda row: abs(math.log(row["batch_size"] / batch_size)))
    column = norm if norm in row else "group"
    lr, nearest = row[column], row["batch_size"]
    source = f"{table['table']}, {column.capitalize()}Norm, batch size {nearest}"
    exact = column == norm and nearest == batch_size and recipe.case == recipe.lr_table
    if nearest != batch_size:
        lr = float(f"{lr * (batch_size / nearest) ** 0.75:.2g}")
        source = f"{row[column]:g} ({source}) times ({batch_size}/{nearest})^0.75"
    if recipe.case != recipe.lr_table:
        source += f", for {recipe.lr_table}"
    return AutoLR(lr, source, exact)
