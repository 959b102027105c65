"""The command line: arguments to calls.

The experiments are imported where they are used, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kernelnorm import __version__
from kernelnorm.norms import NORMS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from kernelnorm.experiments.recipes import RunConfig

_CASES = "digits-vgg8, cifar10-vgg8, imagenette-densenet121 or imagewoof-resnet18"


class _Help(RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and tells the defaults that there are."""

    def _get_help_string(self, action: Action) -> str:
        tell = bool(action.default) and action.default != SUPPRESS
        return f"{action.help} (default: %(default)s)" if tell else action.help or ""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with ``argv`` in place of the process's own arguments.

    A mistake in the arguments exits with 2, a problem that the user can solve with 1 and one line.
    """
    try:
        _main(argv)
    except ModuleNotFoundError as error:
        sys.exit(f"kernelnorm: {error.name} is missing: pip install 'kernelnorm[experiments]'")


def _main(argv: Sequence[str] | None) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="kernelnorm",
        description="Train kernel normalized networks, and compare them with other normalisations.",
        version=__version__,
        formatter_class=_Help,
    )
    commands = parser.add_subcommands(required=False, dest="command")
    for name, (make_parser, _, summary) in _COMMANDS.items():
        commands.add_subcommand(name, make_parser(), help=summary)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return

    from kernelnorm.experiments.data import DataError
    from kernelnorm.experiments.runs import RunError

    try:
        _COMMANDS[arguments.command][1](arguments[arguments.command])
    except (DataError, RunError) as error:
        sys.exit(f"kernelnorm: {error}")
    except KeyboardInterrupt:
        goes_on = arguments.command in ("train", "compare")
        more = "; the same command goes on from the last checkpoint" * goes_on
        print(f"kernelnorm: stopped{more}", file=sys.stderr)
        sys.exit(130)


def _train_parser() -> ArgumentParser:
    parser = _parser(
        "Train a network. The same command goes on with a run that was stopped.",
        "kernelnorm train digits-vgg8",
        "kernelnorm train cifar10-vgg8 --norm batch --batch-size 2 --data-dir ~/data",
        "kernelnorm train --model resnet18 --dataset photos/ --image-size 64 --epochs 20",
        "torchrun --nproc-per-node 4 -m kernelnorm train imagewoof-resnet18 --batch-size 256",
    )
    add = parser.add_argument
    add("--norm", choices=NORMS, default="kernel", help="the normalisation")
    add("--batch-size", type=int, default=32, help="images a step, in all processes")
    _add_run_arguments(parser)
    add("--out", type=Path | None, help="the run's folder; without it runs/CASE/...")
    add("--devices", type=int, default=1, help="how many; torchrun decides itself")
    add("--tensorboard", action="store_true", help="write TensorBoard's files too")
    add("--checkpoint-minutes", type=float, default=10.0, help="between checkpoints in an epoch")
    add("--max-steps", type=int | None, help="pause after that many steps: a trial")
    return parser


def _train(arguments: Namespace) -> None:
    from kernelnorm.experiments.launch import Launch, leave
    from kernelnorm.experiments.trainer import train

    config = _configure(arguments, arguments.norm, arguments.batch_size)
    launch = Launch(
        out=arguments.out,
        devices=arguments.devices,
        tensorboard=arguments.tensorboard,
        checkpoint_minutes=arguments.checkpoint_minutes,
        max_steps=arguments.max_steps,
        **_where(arguments),
    )
    _echo(f"{train(config, launch).path}")
    leave()


def _compare_parser() -> ArgumentParser:
    parser = _parser(
        "Train what is missing of every norm and batch size, then write a table and a picture.",
        "kernelnorm compare digits-vgg8",
        "kernelnorm compare cifar10-vgg8 --norms batch,kernel --batch-sizes 2,32,256 --epochs 5",
    )
    parser.add_argument(
        "--norms", type=_names, default=["batch", "group", "layer", "kernel"], help="with commas"
    )
    parser.add_argument("--batch-sizes", type=_numbers, default=[2, 32], help="with commas")
    _add_run_arguments(parser)
    parser.add_argument("--out", type=Path | None, help="the folder; without it runs/CASE")
    return parser


def _compare(arguments: Namespace) -> None:
    from kernelnorm.experiments.compare import compare
    from kernelnorm.experiments.launch import Launch, leave

    configs = [
        _configure(arguments, norm, batch_size)
        for batch_size in arguments.batch_sizes
        for norm in arguments.norms
    ]
    out = arguments.out or Path("runs") / configs[0].case
    compare(configs, out, Launch(**_where(arguments)))
    leave()


def _evaluate_parser() -> ArgumentParser:
    parser = _parser(
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
    _add_trained_arguments(parser, "last")
    return parser


def _evaluate(arguments: Namespace) -> None:
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


def _predict_parser() -> ArgumentParser:
    parser = _parser(
        "Print the three likeliest classes of images.",
        "kernelnorm predict runs/photos-resnet18/kernel-b32-seed0-0123abcd cat.jpg dog.jpg",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    _add_trained_arguments(parser, "best")
    return parser


def _predict(arguments: Namespace) -> None:
    from kernelnorm.experiments.evaluation import predict

    predictions = predict(
        arguments.run,
        arguments.images,
        checkpoint=arguments.checkpoint,
        accelerator=arguments.accelerator,
    )
    for image, classes in zip(arguments.images, predictions, strict=True):
        print(f"{image}: " + ", ".join(f"{name} {p:.1%}" for name, p in classes))


def _bench_parser() -> ArgumentParser:
    parser = _parser(
        "Measure time and memory of the normalisations side by side, as ratios to BatchNorm.",
        "kernelnorm bench --quick",
        "kernelnorm bench --networks vgg8,resnet50 --sizes 32,224 --batch-sizes 1,2,8,32,128",
        "kernelnorm bench --norms none,batch,kernel --memory-formats channels_last,contiguous",
        "kernelnorm bench --device cuda --dtypes float32,bfloat16 --modes eager,reduce-overhead",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small cases and few rounds, in under two minutes")
    networks_help = "with commas; without it vgg8,resnet18,densenet121, the paper's case studies"
    add("--networks", type=_names, help=networks_help)
    sizes_help = "of the images, one for each network; without it the case studies'"
    add("--sizes", type=_numbers, metavar="PIXELS", help=sizes_help)
    add("--batch-sizes", type=_numbers, help="with commas; without it 2,32")
    norms = ["none", "batch", "group", "layer", "kernel"]
    add("--norms", type=_names, default=norms, help="with commas; none: the floor")
    passes_help = "train: forward, backward and SGD; inference: forward alone"
    add("--passes", type=_names, default=["train", "inference"], help=passes_help)
    dtypes_help = "float32, bfloat16 (autocast), float16 (autocast, on CUDA)"
    add("--dtypes", type=_names, default=["float32"], help=dtypes_help)
    formats_help = "channels_last, contiguous; of both, each norm's faster one counts"
    add("--memory-formats", type=_names, default=["channels_last"], help=formats_help)
    modes_help = "eager, compile, reduce-overhead (torch.compile with CUDA graphs)"
    add("--modes", type=_names, default=["eager"], help=modes_help)
    add("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if any")
    add("--threads", type=int | None, help="of PyTorch on the CPU; without it PyTorch's choice")
    add("--rounds", type=int, default=15, help="the most for a row of the table; --quick: 9")
    add("--seconds", type=float, default=20.0, help="then a row ends, after 3 rounds; --quick: 4")
    add("--out", type=Path, default=Path("runs/bench"), help="for bench.json and bench.png")
    return parser


def _bench(arguments: Namespace) -> None:
    from kernelnorm.experiments.bench import bench, make_plan

    options = arguments.as_dict()
    out = options.pop("out")
    bench(make_plan(**options), out)


_COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace], None], str]] = {
    "train": (_train_parser, _train, "train a network, or go on with its training"),
    "compare": (_compare_parser, _compare, "train several normalisations: a table and a picture"),
    "evaluate": (_evaluate_parser, _evaluate, "accuracy of a trained network on its test images"),
    "predict": (_predict_parser, _predict, "classes of image files"),
    "bench": (_bench_parser, _bench, "time and memory of normalisations, side by side"),
}


def _parser(description: str, *examples: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    text = "\n".join([description, "", "examples:", *(f"  {example}" for example in examples)])
    return ArgumentParser(description=text, print_config=None)


def _add_run_arguments(parser: ArgumentParser) -> None:
    """Add what says what is trained, on which data, and where."""
    add = parser.add_argument
    add(
        "case",
        nargs="?",
        type=str | None,
        help=f"{_CASES}; without it, and without a model, digits",
    )
    add("--model", type=str | None, help="any network, with --dataset, in place of the case's")
    add("--dataset", type=str | None, help="a folder of train/CLASS/* and val/CLASS/*, or a name")
    add("--model-options", type=dict[str, Any], default={}, help='such as {"small_images": true}')
    size_help = "resize images to it; without it the case's"
    add("--image-size", type=int | None, metavar="PIXELS", help=size_help)
    add("--epochs", type=int | None, help="the most epochs; without it the case's")
    add("--lr", type=Literal["auto"] | float, default="auto", help="auto: the paper's Table 4")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and dropout")
    add("--subset", type=int | None, help="train and test on that many images: a trial")
    add(
        "--precision",
        type=Literal["32-true", "bf16-mixed", "16-mixed"],
        default="32-true",
        help="of the arithmetic",
    )
    add("--data-dir", type=Path, default=Path("data"), help="where datasets are, or will be put")
    add("--accelerator", default="auto", help="cpu, cuda, mps or auto")
    add("--compile", action="store_true", help="run the network through torch.compile")
    add("--config", action="config", help="a YAML file with these options")


def _add_trained_arguments(parser: ArgumentParser, checkpoint: str) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Literal["last", "best"],
        default=checkpoint,
        help="last: after the last epoch; best: that with the best test accuracy",
    )
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps or auto")


def _configure(arguments: Namespace, norm: str, batch_size: int) -> RunConfig:
    """Return the configuration of a run; tell if its learning rate is not quite the paper's."""
    from kernelnorm.experiments.recipes import configure, paper_lr, recipe_for

    recipe = recipe_for(arguments.case, model=arguments.model, dataset=arguments.dataset)
    auto = arguments.lr == "auto"
    given = {
        "image_size": arguments.image_size,
        "epochs": arguments.epochs,
        "model_options": arguments.model_options or None,
    }
    config = configure(
        recipe,
        norm=norm,
        batch_size=batch_size,
        lr=None if auto else arguments.lr,
        seed=arguments.seed,
        subset=arguments.subset,
        precision=arguments.precision,
        **{name: value for name, value in given.items() if value is not None},
    )
    lr, source, exact = paper_lr(recipe, norm, batch_size)
    if auto and not exact:
        _echo(f"--lr auto is {lr:g}: {source}")
    return config


def _where(arguments: Namespace) -> dict[str, Any]:
    return {name: arguments[name] for name in ("data_dir", "accelerator", "compile")}


def _echo(text: str) -> None:
    """Print, in one of the processes only."""
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only(print)(text, flush=True)


def _names(value: str | list[str]) -> list[str]:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _numbers(value: str | list[int]) -> list[int]:
    return [int(part) for part in value.split(",")] if isinstance(value, str) else value
