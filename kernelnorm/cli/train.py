"""``kernelnorm train``: train a network, or go on with its training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli.options import add_run_arguments, command_parser, configure_run, echo, where
from kernelnorm.norms import NORMS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Train a network. The same command goes on with a run that was stopped.",
        "kernelnorm train digits-vgg8",
        "kernelnorm train cifar10-vgg8 --norm batch --batch-size 2 --data-dir ~/data",
        "kernelnorm train --model resnet18 --dataset photos/ --image-size 64 --epochs 20",
        "torchrun --nproc-per-node 4 -m kernelnorm train imagewoof-resnet18 --batch-size 256",
    )
    add = parser.add_argument
    add("--norm", choices=NORMS, default="kernel", help="the normalisation")
    add("--batch-size", type=int, default=32, help="images a step, in all processes")
    add_run_arguments(parser)
    add("--out", type=Path | None, help="the run's folder; without it runs/CASE/...")
    add("--devices", type=int, default=1, help="how many; torchrun decides itself")
    add("--tensorboard", action="store_true", help="write TensorBoard's files too")
    add("--checkpoint-minutes", type=float, default=10.0, help="between checkpoints in an epoch")
    add("--max-steps", type=int | None, help="pause after that many steps: a trial")
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.launch import Launch, leave
    from kernelnorm.experiments.trainer import train

    config = configure_run(arguments, arguments.norm, arguments.batch_size)
    launch = Launch(
        out=arguments.out,
        devices=arguments.devices,
        tensorboard=arguments.tensorboard,
        checkpoint_minutes=arguments.checkpoint_minutes,
        max_steps=arguments.max_steps,
        **where(arguments),
    )
    echo(f"{train(config, launch).path}")
    leave()
