"""Options that several commands share."""

from __future__ import annotations

from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelnorm.cli import values
from kernelnorm.cli.names import CASES, MODELS, NORMS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from kernelnorm.experiments.config import RunConfig
    from kernelnorm.experiments.private_options import Privacy
    from kernelnorm.experiments.recipes import Recipe


class Help(RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and shows default values."""

    def _get_help_string(self, action: Action) -> str:
        default = action.default
        if default is None or default is False or default in (SUPPRESS, {}, [{}]):
            return action.help or ""
        if isinstance(default, list):
            default = ",".join(map(str, default))
        return f"{action.help} (default: {default})"


def command_parser(description: str, *examples: str) -> ArgumentParser:
    """Make the parser of a command."""
    from kernelnorm.cli.parser import Parser

    text = "\n".join([description, "", "examples:", *(f"  {example}" for example in examples)])
    return Parser(description=text, formatter_class=Help)


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the options of a run: what is trained, on which data, and where."""
    add_recipe_arguments(parser)
    add = parser.add_argument
    add(
        "--lr",
        type=values.rate,
        default="auto",
        help="learning rate; auto: from the paper's Table 4",
    )
    add("--seed", type=values.seed, default=0, help="random seed")
    add_place_arguments(parser)


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """Add the options that all runs of a comparison or a sweep share."""
    add = parser.add_argument
    add_case_argument(parser, "digits-vgg8, if there is no --model and no --dataset")
    model_help = (
        f"network: {', '.join(MODELS)} (default: the case study's; resnet18 for a --dataset alone)"
    )
    add("--model", type=values.model, help=model_help)
    dataset_help = (
        "folder with CLASS/*, or with train/CLASS/* and val/CLASS/*; or digits, cifar10, "
        "imagenette, imagewoof (default: the case study's)"
    )
    add("--dataset", type=values.dataset, help=dataset_help)
    options_help = 'options of the network, such as {"small_images": true}'
    add("--model-options", type=values.mapping, default={}, metavar="JSON", help=options_help)
    size_help = (
        "image size in pixels (default: the case study's; for a folder 160 with DenseNets, 192 "
        "with other networks, and no resizing with vgg8)"
    )
    add("--image-size", type=values.positive_int, metavar="PIXELS", help=size_help)
    epochs_help = "maximum number of epochs (default: the case study's)"
    add("--epochs", type=values.positive_int, help=epochs_help)
    augment_help = "random crops and flips, true or false (default: the case study's)"
    add("--augment", type=values.boolean, metavar="BOOL", help=augment_help)
    standardise_help = (
        "subtract a mean and divide by a standard deviation per colour, true or false; never for "
        "the norm kernel, which standardises by itself (default: the case study's)"
    )
    add("--standardise", type=values.boolean, metavar="BOOL", help=standardise_help)
    optimizer_help = "sgd or adamw (default: the case study's)"
    add("--optimizer", choices=["sgd", "adamw"], help=optimizer_help)
    schedule_help = "steps: see --lr-milestones; cosine: to zero (default: the case study's)"
    add("--schedule", choices=["steps", "cosine"], help=schedule_help)
    warmup_help = "number of epochs in which the learning rate rises (default: the case study's)"
    add("--warmup-epochs", type=values.number, metavar="EPOCHS", help=warmup_help)
    decay_help = "weight decay (default: the case study's)"
    add("--weight-decay", type=values.number, help=decay_help)
    milestones_help = (
        "comma-separated epochs after which the learning rate is divided by 10 "
        "(default: the case study's)"
    )
    add("--lr-milestones", type=values.milestones, metavar="EPOCHS", help=milestones_help)
    agc_help = (
        "factor of adaptive gradient clipping, for the norm nf, which needs it (default: 0.01)"
    )
    add("--agc", type=values.positive, metavar="FACTOR", help=agc_help)
    subset_help = "number of images to train and to test on, for a trial (default: all)"
    add("--subset", type=values.positive_int, metavar="IMAGES", help=subset_help)
    precisions = ["32-true", "bf16-mixed", "16-mixed"]
    add("--precision", choices=precisions, default="32-true", help="arithmetic precision")
    add_privacy_arguments(parser)


def add_privacy_arguments(parser: ArgumentParser) -> None:
    """Add ``--private`` and the options that need it."""
    add = parser.add_argument
    private_help = (
        "train with differential privacy, by the options --epsilon to --secure-mode; see "
        "docs/private.md"
    )
    add("--private", action="store_true", help=private_help)
    epsilon_help = "privacy budget that all epochs spend together (default: 8)"
    add("--epsilon", type=values.positive, help=epsilon_help)
    delta_help = "delta of the (epsilon, delta) guarantee (default: 1e-5)"
    add("--delta", type=values.fraction, help=delta_help)
    norm_help = "norm to which the gradient of each sample is clipped (default: 1)"
    add("--max-grad-norm", type=values.positive, metavar="NORM", help=norm_help)
    views_help = "augmented views of a sample per step, clipped as one (default: 1)"
    add("--augmentations", type=values.positive_int, metavar="VIEWS", help=views_help)
    ema_help = "test and save an average of the weights with this decay, such as 0.99"
    add("--ema", type=values.fraction, metavar="DECAY", help=ema_help)
    micro_help = "maximum number of views in one forward pass, to save memory (default: all)"
    add("--micro-batch-size", type=values.positive_int, metavar="VIEWS", help=micro_help)
    secure_help = "draw noise and batches with torchcsprng, for a release; not repeatable"
    add("--secure-mode", action="store_true", help=secure_help)


def add_case_argument(parser: ArgumentParser, default: str) -> None:
    """Add the case study, without a default value: that would replace the value of a YAML file."""
    cases = f"{', '.join(CASES[:-1])} or {CASES[-1]}"
    text = f"case study: {cases} (default: {default})"
    parser.add_argument("case", nargs="?", type=values.case, help=text).default = SUPPRESS


def add_norms_argument(parser: ArgumentParser) -> None:
    """Add the normalisations that are compared; the default is the paper's."""
    norms = ["batch", "group", "layer", "kernel"]
    text = f"comma-separated, from {', '.join(NORMS)}"
    parser.add_argument("--norms", type=values.norms, default=norms, help=text)


def add_place_arguments(parser: ArgumentParser) -> None:
    """Add the options for the data folder, the device, the compilation and a YAML file."""
    from kernelnorm.cli.parser import ConfigFile

    add = parser.add_argument
    data_help = "folder of the datasets, which are downloaded to it if they are missing"
    add("--data-dir", type=values.folder, default=Path("data"), help=data_help)
    add_accelerator_argument(parser)
    add("--compile", action="store_true", help="run the network through torch.compile")
    config_help = (
        "YAML file with these options, such as batch_size: 32; options on the command line win"
    )
    add("--config", action=ConfigFile, type=values.path, metavar="FILE", help=config_help)


def add_accelerator_argument(parser: ArgumentParser) -> None:
    """Add the option for the kind of device; ``gpu`` is CUDA or MPS."""
    accelerators = ["auto", "cpu", "cuda", "mps", "gpu"]
    parser.add_argument("--accelerator", choices=accelerators, default="auto", help="device")


def add_trained_arguments(parser: ArgumentParser, checkpoint: str) -> None:
    """Add the options for the checkpoint of a run and for the device."""
    parser.add_argument(
        "--checkpoint",
        choices=["last", "best"],
        default=checkpoint,
        help="last: after the last epoch; best: with the best test accuracy",
    )
    add_accelerator_argument(parser)


def configure_run(arguments: Namespace, norm: str, batch_size: int) -> RunConfig:
    """Return the configuration of a run."""
    from kernelnorm.experiments.config import configure

    return configure(
        recipe_of(arguments),
        norm=norm,
        batch_size=batch_size,
        lr=None if arguments.lr == "auto" else arguments.lr,
        seed=arguments.seed,
        **choices(arguments),
    )


def check_agc(arguments: Namespace, configs: Sequence[RunConfig]) -> None:
    """Check that a run needs adaptive gradient clipping, if ``--agc`` is given.

    Raises:
        RunError: no run needs it.
    """
    from kernelnorm.experiments.errors import RunError

    if arguments.agc is not None and all(config.agc is None for config in configs):
        norms = ", ".join(dict.fromkeys(config.norm for config in configs))
        raise RunError(f"--agc is for the norm nf, got {norms}: leave it out")


def explain_lr(arguments: Namespace, configs: Sequence[RunConfig]) -> None:
    """Print where the learning rates come from, if they are not exactly the paper's."""
    from kernelnorm.experiments.paper import auto_lr

    if arguments.lr != "auto":
        return
    recipe = recipe_of(arguments)
    found = [auto_lr(recipe, c.norm, c.batch_size, c.optimizer) for c in configs]
    if all(lr.exact for lr in found):
        return
    if len(found) == 1:
        echo(f"learning rate {found[0].lr:g} (--lr auto: {found[0].source})")
    elif configs[0].optimizer == "adamw":
        echo(f"--lr auto: {found[0].source}")
    else:
        echo(f"--lr auto: the paper's for {recipe.lr_table}, scaled to batch sizes that it lacks")


def recipe_of(arguments: Namespace) -> Recipe:
    """Return the recipe of the case study, the model and the dataset."""
    from kernelnorm.experiments.recipes import recipe_for

    case = arguments.get("case")
    return recipe_for(case, model=arguments.model, dataset=arguments.dataset)


def choices(arguments: Namespace) -> dict[str, Any]:
    """Return the given options that replace the recipe's values."""
    chosen = {
        "image_size": arguments.image_size,
        "epochs": arguments.epochs,
        "augment": arguments.augment,
        "standardise": arguments.standardise,
        "optimizer": arguments.optimizer,
        "schedule": arguments.schedule,
        "warmup_epochs": arguments.warmup_epochs,
        "weight_decay": arguments.weight_decay,
        "lr_milestones": arguments.lr_milestones,
        "model_options": arguments.model_options or None,
        "agc": arguments.agc,
        "subset": arguments.subset,
        "precision": arguments.precision,
        "private": privacy(arguments),
    }
    return {name: value for name, value in chosen.items() if value is not None}


def privacy(arguments: Namespace) -> Privacy | None:
    """Return the options of private training; ``None`` without ``--private``.

    Raises:
        RunError: an option of private training is given without ``--private``.
    """
    from kernelnorm.experiments.errors import RunError
    from kernelnorm.experiments.private_options import Privacy

    names = [field.name for field in fields(Privacy)]
    given = {name: arguments[name] for name in names if arguments[name] not in (None, False)}
    if arguments.private:
        return Privacy(**given)
    if given:
        option = next(iter(given)).replace("_", "-")
        raise RunError(f"--{option} is for private training: add --private, or leave it out")
    return None


def where(arguments: Namespace) -> dict[str, Any]:
    """Return the data folder, device and compilation, as arguments of :class:`Launch`."""
    return {name: arguments[name] for name in ("data_dir", "accelerator", "compile")}


def echo(text: str) -> None:
    """Print on rank 0 only."""
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only(print)(text, flush=True)
