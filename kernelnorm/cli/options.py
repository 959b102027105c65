"""What the commands' arguments have in common."""

from __future__ import annotations

from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from kernelnorm.experiments.recipes import Recipe, RunConfig


class Help(RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and tells the defaults that there are."""

    def _get_help_string(self, action: Action) -> str:
        tell = bool(action.default) and action.default != SUPPRESS
        return f"{action.help} (default: %(default)s)" if tell else action.help or ""


def command_parser(description: str, *examples: str) -> ArgumentParser:
    """Make the parser of a command."""
    from jsonargparse import ArgumentParser

    text = "\n".join([description, "", "examples:", *(f"  {example}" for example in examples)])
    return ArgumentParser(description=text, print_config=None)


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add what says what is trained, on which data, and where."""
    add_recipe_arguments(parser)
    add = parser.add_argument
    add("--lr", type=Literal["auto"] | float, default="auto", help="auto: the paper's Table 4")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and dropout")
    add_place_arguments(parser)


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """Add what all runs of a comparison or a sweep have in common."""
    add = parser.add_argument
    add_case_argument(parser, "without it, and without a model, digits")
    add("--model", type=str | None, help="any network, with --dataset, in place of the case's")
    add("--dataset", type=str | None, help="a folder of train/CLASS/* and val/CLASS/*, or a name")
    add("--model-options", type=dict[str, Any], default={}, help='such as {"small_images": true}')
    size_help = "resize images to it; without it the case's"
    add("--image-size", type=int | None, metavar="PIXELS", help=size_help)
    add("--epochs", type=int | None, help="the most epochs; without it the case's")
    add("--augment", type=bool | None, help="crop and flip at random; without it the case's")
    add("--weight-decay", type=float | None, help="of SGD; without it the case's")
    milestones_help = "epochs, with commas, after each a tenth of the rate; without it the case's"
    add("--lr-milestones", type=numbers, metavar="EPOCHS", help=milestones_help)
    add("--subset", type=int | None, help="train and test on that many images: a trial")
    precisions = Literal["32-true", "bf16-mixed", "16-mixed"]
    add("--precision", type=precisions, default="32-true", help="of the arithmetic")


def add_case_argument(parser: ArgumentParser, otherwise: str) -> None:
    """Add the case study; a default value would be taken in place of a YAML file's."""
    cases = "digits-vgg8, cifar10-vgg8, imagenette-densenet121 or imagewoof-resnet18"
    parser.add_argument("case", nargs="?", default=SUPPRESS, help=f"{cases}; {otherwise}")


def add_norms_argument(parser: ArgumentParser) -> None:
    """Add the normalisations that are set side by side; without it those of the paper."""
    norms = ["batch", "group", "layer", "kernel"]
    parser.add_argument("--norms", type=names, default=norms, help="with commas")


def add_place_arguments(parser: ArgumentParser) -> None:
    """Add where the data is and what computes."""
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="where datasets are, or will be put")
    add("--accelerator", default="auto", help="cpu, cuda, mps or auto")
    add("--compile", action="store_true", help="run the network through torch.compile")
    add("--config", action="config", help="a YAML file with these options")


def add_trained_arguments(parser: ArgumentParser, checkpoint: str) -> None:
    """Add what of a trained network is used, and where."""
    parser.add_argument(
        "--checkpoint",
        type=Literal["last", "best"],
        default=checkpoint,
        help="last: after the last epoch; best: that with the best test accuracy",
    )
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps or auto")


def configure_run(arguments: Namespace, norm: str, batch_size: int) -> RunConfig:
    """Return the configuration of a run; tell if its learning rate is not quite the paper's."""
    from kernelnorm.experiments.recipes import auto_lr, configure

    recipe = recipe_of(arguments)
    auto = arguments.lr == "auto"
    config = configure(
        recipe,
        norm=norm,
        batch_size=batch_size,
        lr=None if auto else arguments.lr,
        seed=arguments.seed,
        **choices(arguments),
    )
    lr, source, exact = auto_lr(recipe, norm, batch_size, config.optimizer)
    if auto and not exact:
        echo(f"--lr auto is {lr:g}: {source}")
    return config


def recipe_of(arguments: Namespace) -> Recipe:
    """Return the recipe that the case, the model and the dataset tell."""
    from kernelnorm.experiments.recipes import recipe_for

    case = arguments.get("case")
    return recipe_for(case, model=arguments.model, dataset=arguments.dataset)


def choices(arguments: Namespace) -> dict[str, Any]:
    """Return the fields of a run's configuration that were given in place of the recipe's."""
    given = {
        "image_size": arguments.image_size,
        "epochs": arguments.epochs,
        "augment": arguments.augment,
        "weight_decay": arguments.weight_decay,
        "lr_milestones": arguments.lr_milestones,
        "model_options": arguments.model_options or None,
        "subset": arguments.subset,
        "precision": arguments.precision,
    }
    return {name: value for name, value in given.items() if value is not None}


def where(arguments: Namespace) -> dict[str, Any]:
    """Return where the data is and what computes, as :class:`Launch` takes them."""
    return {name: arguments[name] for name in ("data_dir", "accelerator", "compile")}


def echo(text: str) -> None:
    """Print, in one of the processes only."""
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only(print)(text, flush=True)


def names(value: str | list[str]) -> list[str]:
    """Return what is between commas."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def numbers(value: str | int | list[int]) -> list[int]:
    """Return the numbers of a list, or between commas."""
    return [int(part) for part in _parts(value)]


def rates(value: str | float | list[float]) -> list[float] | str:
    """Return the learning rates of a list, or between commas, or ``"auto"``."""
    return "auto" if value == "auto" else [float(part) for part in _parts(value)]


def _parts(value: str | float | list[int] | list[float]) -> list[str]:
    """Return what a list has, or a text between its commas, as YAML or a command line gives it."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part) for part in parts if part != ""]
