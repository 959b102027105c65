"""The paper's case studies as recipes, and recipes for other networks and datasets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kernelnorm.experiments.data import DATASETS
from kernelnorm.experiments.errors import RunError
from kernelnorm.models import list_models

__all__ = ["NAMED_DATASETS", "RECIPES", "Recipe", "plain_dataset", "recipe_for"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained on one dataset, whatever its normalisation and batch size.

    The loss is always cross-entropy.

    Args:
        case: the name of the case study, for people and for folders.
        dataset: ``"digits"``, ``"cifar10"``, ``"imagenette"``, ``"imagewoof"``, or a folder: see
            :func:`kernelnorm.experiments.data.load_images`. A case study has a named dataset.
        model: one of :func:`kernelnorm.models.list_models`.
        model_options: further keyword arguments of the model.
        image_size: height and width that images are resized to; ``None`` keeps the dataset's size.
        epochs: the most epochs; training stops before when it has converged.
        augment: random crop and horizontal flip of the training images.
        standardise: subtract a mean and divide by a deviation per colour. It applies to every
            normalisation except ``"kernel"``, whose first layer does it by itself (Section 5).
        optimizer: ``"sgd"`` (the paper's) or ``"adamw"``.
        momentum: of SGD.
        weight_decay: of the optimizer.
        schedule: ``"steps"`` (the paper's, by ``lr_milestones``), or ``"cosine"``: the learning
            rate falls along half a cosine to zero at the last epoch.
        lr_milestones: numbers of epochs after which the learning rate is multiplied by 0.1.
        warmup_epochs: the number of epochs at the start in which the learning rate rises linearly.
        lr_table: the case study whose part of Table 4 ``--lr auto`` uses.
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
DIGITS = replace(  # our own, for a first look: seconds on any machine, no download
    CIFAR10,
    case="digits-vgg8",
    dataset="digits",
    model_options={"width": 0.25},
    image_size=16,  # VGG8 halves it three times
    epochs=8,
)
RECIPES = {recipe.case: recipe for recipe in (DIGITS, CIFAR10, IMAGENETTE, IMAGEWOOF)}
NAMED_DATASETS = {"digits", *DATASETS}
"""The datasets that are not folders."""

_FAMILIES = {"vgg": CIFAR10, "densenet": IMAGENETTE}
"""The recipes for families of models; models of other families get Imagewoof's."""


def recipe_for(
    case: str | None = None, *, model: str | None = None, dataset: str | Path | None = None
) -> Recipe:
    """Return the recipe of a case study, or one for any model and dataset.

    Without arguments it is the recipe of the digits. The model and dataset of a case study get the
    recipe of that case study. Another model gets the recipe of the paper's case study with a model
    of its family: vgg that of CIFAR-10-VGG8, densenet that of Imagenette-DenseNet121, all others
    that of Imagewoof-ResNet18. A dataset alone gets the model ``resnet18``. The images of a named
    dataset that is not the recipe's own keep their size.

    Raises:
        RunError: the case or the model is unknown, or there is a model but no dataset.
    """
    if model is not None and model not in list_models():
        raise RunError(f"unknown model {model!r}: choose from {', '.join(list_models())}")
    if case is not None and case not in RECIPES:
        raise RunError(f"unknown case {case!r}: choose from {', '.join(RECIPES)}")
    dataset = None if dataset is None else plain_dataset(dataset)
    if case is None and model is None and dataset is None:
        return DIGITS
    if case is None and dataset is None:
        raise RunError(f"--model {model} needs --dataset (a folder or a name), or a case")
    if case is None:
        model = model or "resnet18"
        cases = (own for own in RECIPES.values() if (own.model, own.dataset) == (model, dataset))
        families = (base for family, base in _FAMILIES.items() if model.startswith(family))
        base = next(cases, None) or next(families, IMAGEWOOF)
    else:
        base = RECIPES[case]
    if model in (None, base.model) and dataset in (None, base.dataset):
        return base
    model, dataset = model or base.model, dataset or base.dataset
    own_size = dataset in NAMED_DATASETS and dataset != base.dataset
    return replace(
        base,
        case=f"{Path(dataset).resolve().name}-{model}",
        dataset=dataset,
        model=model,
        model_options=base.model_options if model == base.model else {},
        image_size=None if own_size else base.image_size,
    )


def plain_dataset(dataset: str | Path) -> str:
    """Return a dataset's name, or its path in one form: ``photos`` for ``photos/``.

    ``./digits`` stays as it is: it is a folder, and ``digits`` a named dataset.
    """
    plain = str(Path(dataset).expanduser())
    return str(dataset) if plain in NAMED_DATASETS else plain
