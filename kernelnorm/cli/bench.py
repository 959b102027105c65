"""``kernelnorm bench``: time and memory of normalisations, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kernelnorm.cli.options import command_parser, names, numbers

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser(
        "Measure time and memory of the normalisations side by side, as ratios to BatchNorm.",
        "kernelnorm bench --quick",
        "kernelnorm bench --networks vgg8,resnet50 --sizes 32,224 --batch-sizes 1,2,8,32,128",
        "kernelnorm bench --norms none,batch,kernel --memory-formats channels_last,contiguous",
        "kernelnorm bench --device cuda --dtypes float32,bfloat16 --modes eager,reduce-overhead",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small cases and few rounds, in under two minutes")
    networks_help = "with commas; without it vgg8,resnet18,densenet121, the paper's case studies"
    add("--networks", type=names, help=networks_help)
    sizes_help = "of the images, one for each network; without it the case studies'"
    add("--sizes", type=numbers, metavar="PIXELS", help=sizes_help)
    add("--batch-sizes", type=numbers, help="with commas; without it 2,32")
    norms = ["none", "batch", "group", "layer", "kernel"]
    add("--norms", type=names, default=norms, help="with commas; none: the floor")
    passes_help = "train: forward, backward and SGD; inference: forward alone"
    add("--passes", type=names, default=["train", "inference"], help=passes_help)
    dtypes_help = "float32, bfloat16 (autocast), float16 (autocast, on CUDA)"
    add("--dtypes", type=names, default=["float32"], help=dtypes_help)
    formats_help = "channels_last, contiguous; of both, each norm's faster one counts"
    add("--memory-formats", type=names, default=["channels_last"], help=formats_help)
    modes_help = "eager, compile, reduce-overhead (torch.compile with CUDA graphs)"
    add("--modes", type=names, default=["eager"], help=modes_help)
    add("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if any")
    add("--threads", type=int | None, help="of PyTorch on the CPU; without it PyTorch's choice")
    add("--rounds", type=int, default=15, help="the most for a row of the table; --quick: 9")
    add("--seconds", type=float, default=20.0, help="then a row ends, after 3 rounds; --quick: 4")
    add("--out", type=Path, default=Path("runs/bench"), help="for bench.json and bench.png")
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.bench import bench, make_plan

    options = arguments.as_dict()
    out = options.pop("out")
    bench(make_plan(**options), out)
