"""``kernelnorm predict``: classes of image files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.options import add_trained_arguments, command_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Print the three most probable classes of each image.",
        "kernelnorm predict runs/photos-resnet18/kernel-b32-seed0-0123abcd cat.jpg dog.jpg",
    )
    parser.add_argument("run", type=values.path, metavar="RUN", help="folder of the run")
    images_help = "image files; put -- before a name that begins with -"
    parser.add_argument("images", type=values.path, nargs="+", metavar="IMAGE", help=images_help)
    add_trained_arguments(parser, "best")
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.evaluation import predict

    predictions = predict(
        arguments.run,
        arguments.images,
        checkpoint=arguments.checkpoint,
        accelerator=arguments.accelerator,
    )
    for image, classes in zip(arguments.images, predictions, strict=True):
        print(f"{image}: " + ", ".join(f"{name} {p:.1%}" for name, p in classes))
