"""``kernelnorm train``: train a network, or resume its training."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.names import NORMS
from kernelnorm.cli.options import (
    add_run_arguments,
    check_agc,
    command_parser,
    configure_run,
    echo,
    explain_lr,
    where,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Train a network. Run the same command again to resume a stopped run.",
        "kernelnorm train digits-vgg8",
        "kernelnorm train cifar10-vgg8 --norm batch --batch-size 2 --data-dir ~/data",
        "kernelnorm train --model resnet18 --dataset photos/ --image-size 64 --epochs 20",
        "kernelnorm train --optimizer adamw --schedule cosine --warmup-epochs 1",
        "kernelnorm train --epochs 20 --init-from runs/first --out runs/second",
        "kernelnorm train --private --epsilon 3 --batch-size 256 --lr 0.5 --epochs 20",
        "torchrun --nproc-per-node 4 -m kernelnorm train imagewoof-resnet18 --batch-size 256",
    )
    add = parser.add_argument
    add("--norm", choices=NORMS, default="kernel", help="normalisation")
    size_help = "images per step, over all devices"
    add("--batch-size", type=values.positive_int, default=32, help=size_help)
    add_run_arguments(parser)
    out_help = "folder of the run (default: runs/CASE/..., from the options)"
    init_help = "start from the weights of a run, or of a PyTorch or safetensors file"
    add("--init-from", type=values.path, metavar="RUN|FILE", help=init_help)
    add("--out", type=values.folder, metavar="DIR", help=out_help)
    devices_help = "number of devices; under torchrun, its number of processes"
    add("--devices", type=values.positive_int, default=1, help=devices_help)
    add("--tensorboard", action="store_true", help="also write TensorBoard files")
    minutes_help = "minutes between two checkpoints within an epoch"
    add("--checkpoint-minutes", type=values.number, default=10.0, help=minutes_help)
    steps_help = "pause after this number of steps, for a trial"
    add("--max-steps", type=values.positive_int, help=steps_help)
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.launch import Launch, leave
    from kernelnorm.experiments.trainer import train

    config = configure_run(arguments, arguments.norm, arguments.batch_size)
    check_agc(arguments, [config])
    if arguments.init_from is not None:
        config = replace(config, init_from=_origin(arguments))
    explain_lr(arguments, [config])
    launch = Launch(
        out=arguments.out,
        init_from=arguments.init_from,
        devices=arguments.devices,
        tensorboard=arguments.tensorboard,
        checkpoint_minutes=arguments.checkpoint_minutes,
        max_steps=arguments.max_steps,
        **where(arguments),
    )
    folder = train(config, launch)
    echo(f"Run:  {folder.path}")
    if config.finished(folder.read_metrics()):
        echo(f"Next: kernelnorm evaluate {shlex.quote(str(folder.path))}")
    leave()


def _origin(arguments: Namespace) -> str:
    """Return the fingerprint of the weights to start from.

    A run that has begun no longer needs them: if they cannot be read or have changed, it is the one
    in its ``config.yaml``.
    """
    from kernelnorm.experiments.errors import RunError
    from kernelnorm.experiments.networks import read_weights
    from kernelnorm.experiments.runs import RunFolder

    begun = ""
    if arguments.out is not None and (arguments.out / "last.ckpt").exists():
        begun = str(RunFolder(arguments.out).read_config()["run"].get("init_from", ""))
    try:
        found = read_weights(arguments.init_from).fingerprint()
    except RunError:
        if not begun:
            raise
        return begun
    if begun and begun != found:
        echo(
            f"warning: {arguments.out} started from other weights than {arguments.init_from}. The "
            "run resumes from its checkpoint; --init-from has no effect"
        )
    return begun or found
