"""``kernelnorm evaluate-published``: accuracy of published weights on ImageNet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.evaluate import add_evaluation_argument, chosen_evaluations, print_scores
from kernelnorm.cli.names import PUBLISHED
from kernelnorm.cli.options import add_accelerator_argument, command_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Print the loss and accuracy on ImageNet of weights that the paper's authors published.\n"
        "Images are resized to 256 pixels along the shorter side; the central 224x224 are used.",
        "kernelnorm evaluate-published knresnet18 knresnet18.pt imagenet/val",
        "kernelnorm evaluate-published knresnet50 knresnet50.pt imagenet/val --standardise none",
        "kernelnorm evaluate-published knresnet18 knresnet18.pt imagenet/val --subset 1000",
    )
    add = parser.add_argument
    network_help = ", ".join(PUBLISHED)
    add("network", choices=PUBLISHED, metavar="NETWORK", help=network_help)
    add("file", type=values.path, metavar="FILE", help="file of the weights")
    images_help = "folder with CLASS/*, the classes in the order of their names"
    add("images", type=values.path, metavar="IMAGES", help=images_help)
    add_evaluation_argument(parser)
    standardise_help = (
        "imagenet: by the mean and standard deviation of ImageNet; none: values from 0 to 1. It is "
        "not known how the authors standardised their images, so try both"
    )
    add("--standardise", choices=["imagenet", "none"], default="imagenet", help=standardise_help)
    subset_help = "number of images, for a trial (default: all)"
    add("--subset", type=values.positive_int, metavar="IMAGES", help=subset_help)
    add("--batch-size", type=values.positive_int, default=64, help="images at a time")
    add_accelerator_argument(parser)
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.published import evaluate_published

    scores = evaluate_published(
        arguments.network,
        arguments.file,
        arguments.images,
        evaluations=chosen_evaluations(arguments),
        standardise=arguments.standardise == "imagenet",
        subset=arguments.subset,
        batch_size=arguments.batch_size,
        accelerator=arguments.accelerator,
    )
    print_scores(scores)
