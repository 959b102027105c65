"""``kernelnorm bench``: time and memory of normalisations, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kernelnorm.cli import values
from kernelnorm.cli.names import MODELS
from kernelnorm.cli.options import command_parser

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
        "kernelnorm bench --private --networks vgg8 --batch-sizes 64",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small cases and few rounds, under two minutes")
    private_help = (
        "measure steps of private training: by bookkeeping, and by the hooks and the ghost norms "
        "of Opacus, with KernelNorm and with GroupNorm, as ratios to the ordinary step with "
        "KernelNorm (default: --networks vgg8,knresnet13 --batch-sizes 64)"
    )
    add("--private", action="store_true", help=private_help)
    networks_help = (
        f"comma-separated, from {', '.join(MODELS)} "
        "(default: vgg8,resnet18,densenet121, the paper's case studies)"
    )
    add("--networks", type=values.models, help=networks_help)
    sizes_help = "image size of each network, comma-separated (default: the case studies')"
    add("--sizes", type=values.integers, metavar="PIXELS", help=sizes_help)
    add("--batch-sizes", type=values.integers, help="comma-separated (default: 2,32)")
    norms_help = "comma-separated; none: no norm (default: none,batch,group,layer,kernel)"
    add("--norms", type=values.norms, help=norms_help)
    passes_help = "train: forward, backward and SGD; inference: forward alone (default: both)"
    add("--passes", type=values.passes, help=passes_help)
    dtypes_help = "float32, bfloat16 (autocast), float16 (autocast, on CUDA)"
    add("--dtypes", type=values.dtypes, default=["float32"], help=dtypes_help)
    formats_help = "channels_last, contiguous; with both, the faster one of each norm is reported"
    add(
        "--memory-formats",
        type=values.memory_formats,
        default=["channels_last"],
        help=formats_help,
    )
    modes_help = "eager, compile, reduce-overhead (torch.compile with CUDA graphs)"
    add("--modes", type=values.modes, default=["eager"], help=modes_help)
    device_help = "auto: CUDA if available; the other commands have --accelerator"
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help=device_help)
    threads_help = "CPU threads of PyTorch (default: PyTorch's choice)"
    add("--threads", type=values.positive_int, help=threads_help)
    rounds_help = "maximum number of rounds of a row of the table; with --quick at most 9"
    add("--rounds", type=values.positive_int, default=15, help=rounds_help)
    seconds_help = "time limit of a row, which has at least 3 rounds; with --quick at most 4"
    add("--seconds", type=values.number, default=20.0, help=seconds_help)
    out_help = "folder of bench.json and bench.png"
    add("--out", type=values.folder, default=Path("runs/bench"), metavar="DIR", help=out_help)
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from kernelnorm.experiments.bench import bench, make_plan

    options = arguments.as_dict()
    out = options.pop("out")
    bench(make_plan(**options), out)
    print("Next: kernelnorm compare, for the accuracy of the normalisations")
