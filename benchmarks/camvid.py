"""Semantic segmentation on CamVid at batch sizes 1, 2 and 8: the study of docs/results/camvid.md.

    python benchmarks/camvid.py run camvid.zip      trains the runs that results.jsonl lacks
    python benchmarks/camvid.py table               prints the tables
    python benchmarks/camvid.py cost                measures bytes and seconds of a training step
    python benchmarks/camvid.py picture camvid.zip  draws predictions

Each run adds a line to results.jsonl; an interrupted run resumes at its last epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from camvid_report import draw_picture, print_costs, print_tables
from camvid_runs import run_missing

from kernelnorm.experiments.heap import keep_freed_memory


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table", "cost", "picture"))
    parser.add_argument("archive", type=Path, nargs="?", help="camvid.zip, for run and picture")
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--limit", type=int, default=1000, help="maximum number of runs to train")
    parser.add_argument("--scale", type=int, default=1, help="factor of the image size, for cost")
    parser.add_argument("--picture", type=Path, default=Path("camvid.png"), help="file to draw")
    args = parser.parse_args(arguments)
    if args.command in ("run", "picture") and args.archive is None:
        parser.error(f"{args.command} needs the archive: give camvid.zip")
    torch.set_num_threads(1)
    keep_freed_memory()
    if args.command == "run":
        run_missing(args.archive, args.out, args.limit)
    elif args.command == "table":
        print_tables(args.out)
    elif args.command == "cost":
        print_costs(args.scale)
    else:
        draw_picture(args.archive, args.out, args.picture)


if __name__ == "__main__":
    main()
