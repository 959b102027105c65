"""``kernelnorm evaluate``: accuracy of a trained network on its test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kernelnorm.cli.options import add_trained_arguments, command_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Print a run's loss and accuracy on its test images.",
        "kernelnorm evaluate runs/digits-vgg8/kernel-b32-seed0-0123abcd",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--evaluation",
        type=Literal["all", "expected", "plain", "monte_carlo"],
        default="all",
        help="how kernel layers take their statistics outside training",
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the data is")
    parser.add_argument("--dataset", type=Path | None, help="the folder of images, if it has moved")
    add_trained_arguments(parser, "last")
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.evaluation import EVALUATIONS, evaluate

    chosen = EVALUATIONS if arguments.evaluation == "all" else (arguments.evaluation,)
    scores = evaluate(
        arguments.run,
        data_dir=arguments.data_dir,
        dataset=arguments.dataset,
        evaluations=chosen,
        checkpoint=arguments.checkpoint,
        accelerator=arguments.accelerator,
    )
    print(f"{'evaluation':12}  {'test loss':>9}  test accuracy")
    for score in scores:
        spread = f" ± {score.accuracy_spread:.2%} ({score.passes} passes)" * (score.passes > 1)
        print(f"{score.evaluation:12}  {score.loss:9.4f}  {score.accuracy:13.2%}{spread}")
