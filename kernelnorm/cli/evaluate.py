"""``kernelnorm evaluate``: accuracy of a trained network on its test images."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.options import add_trained_arguments, command_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from kernelnorm.arguments import Evaluation
    from kernelnorm.experiments.evaluation import Score


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Print a run's loss and accuracy on its test images.",
        "kernelnorm evaluate runs/digits-vgg8/kernel-b32-seed0-0123abcd",
    )
    parser.add_argument("run", type=values.path, metavar="RUN", help="folder of the run")
    add_evaluation_argument(parser)
    data_help = "folder of the datasets"
    parser.add_argument("--data-dir", type=values.folder, default=Path("data"), help=data_help)
    dataset_help = "folder of the images, if it has moved"
    parser.add_argument("--dataset", type=values.path, help=dataset_help)
    add_trained_arguments(parser, "last")
    return parser


def add_evaluation_argument(parser: ArgumentParser) -> None:
    """Add the option for the evaluations of kernel layers."""
    parser.add_argument(
        "--evaluation",
        choices=["all", "expected", "plain", "monte_carlo"],
        default="all",
        help="how kernel layers compute their statistics outside training",
    )


def chosen_evaluations(arguments: Namespace) -> Sequence[Evaluation]:
    """Return the evaluations of kernel layers."""
    from kernelnorm.experiments.evaluation import EVALUATIONS

    return EVALUATIONS if arguments.evaluation == "all" else (arguments.evaluation,)


def print_scores(scores: Sequence[Score]) -> None:
    """Print a table with a line for each behaviour of kernel layers."""
    print(f"{'evaluation':12}  {'test loss':>9}  test accuracy")
    for score in scores:
        spread = f" ± {score.accuracy_spread:.2%} ({score.passes} passes)" * (score.passes > 1)
        print(f"{score.evaluation:12}  {score.loss:9.4f}  {score.accuracy:13.2%}{spread}")


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.evaluation import evaluate

    scores = evaluate(
        arguments.run,
        data_dir=arguments.data_dir,
        dataset=arguments.dataset,
        evaluations=chosen_evaluations(arguments),
        checkpoint=arguments.checkpoint,
        accelerator=arguments.accelerator,
    )
    print_scores(scores)
    print(f"\nNext: kernelnorm predict {shlex.quote(str(arguments.run))} IMAGE ...")
