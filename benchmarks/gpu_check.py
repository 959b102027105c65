"""Tests and measures kernelnorm on a GPU, in at most 10 minutes: four pieces and a page.

    python benchmarks/gpu_check.py                              # all pieces
    python benchmarks/gpu_check.py suite primitives             # some of them
    python benchmarks/gpu_check.py bench --seconds 550 --continue
    python benchmarks/gpu_check.py train --data ~/data
    python benchmarks/gpu_check.py --dry                        # toy sizes, on the CPU

- ``suite``: the layers' tests on the GPU.
- ``primitives``: the kernels against the bandwidth of a copy, in float32 and bfloat16.
- ``bench``: a training step of the paper's three networks at batch sizes 2, 32 and 256, in float32
  (TF32) and bfloat16, eager, with CUDA graphs and compiled; peak memory.
- ``train``: CIFAR-10, VGG8, as in the paper, at batch sizes 256 and 32, all runs at once.

Each piece has a time limit. A piece writes its output and measurements to OUT/DEVICE while it runs,
and README.md in this folder sums them up. With ``--continue``, steps that succeeded before are not
repeated.

The machine needs PyTorch 2.11 or later with Triton, and the packages of ``kernelnorm[dev]``;
kernelnorm itself is taken from this checkout. If the machine has no internet access, download the
missing packages as wheels on another machine, and bring them:

    pip download --only-binary :all: --no-deps -d wheels pytest pluggy iniconfig hypothesis ...
    python benchmarks/gpu_check.py --wheels wheels

A wheel with compiled code has to be for the machine's Python: see ``--python-version`` of pip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_check_page import write_page

ROOT = Path(__file__).parent.parent
SECONDS = {"suite": 150, "primitives": 30, "bench": 220, "train": 160}
"""Time limit of each piece."""
GRACE = 10
"""Seconds that a stopped program has to write its results."""


class Step(NamedTuple):
    """A program to run; its output goes to ``NAME.txt``."""

    name: str
    command: list[str]


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def suite(options: argparse.Namespace) -> list[Step]:
    files = ["tests/test_mask.py", "tests/test_windows.py"]
    if not options.dry:
        others = re.compile(r"kernelnorm\.(cli|experiments)|ops\.backends(\.| import .*\b)cpu\b")
        tests = sorted((ROOT / "tests").glob("test_*.py"))
        files = [f"tests/{p.name}" for p in tests if not others.search(p.read_text())]
    workers = ["-n", "4"] if find_spec("xdist") and not options.dry else []
    pytest = ["-m", "pytest", "-vv", "--tb", "short", "-p", "no:cacheprovider", "-m", "not slow"]
    pytest += ["-p", "no:benchmark"]  # it warns if there are workers
    return [Step("suite", python(*pytest, *workers, "--device", options.device, *files))]


def primitives(options: argparse.Namespace) -> list[Step]:
    steps = []
    for dtype in ("float32", "bfloat16"):
        command = ["benchmarks/primitives.py", "--device", options.device, "--dtype", dtype]
        rounds = ["--rounds", "1", "--batch-size", "1"] if options.dry else ["--batch-size", "128"]
        steps.append(Step(f"primitives-{dtype}", python(*command, *rounds)))
    return steps


def bench(options: argparse.Namespace) -> list[Step]:
    """Return the steps; the eager ones come first, since compiling takes most of the time."""
    networks, batches = ("vgg8", "resnet18", "densenet121"), ("2", "32", "256")
    cases = [(network, "eager", ",".join(batches)) for network in networks]
    cases += [
        (n, mode, b) for n, b, mode in product(networks, batches, ("reduce-overhead", "compile"))
    ]
    limits = ["--rounds", "9", "--seconds", "2", "--dtypes", "float32,bfloat16"]
    if options.dry:
        cases, limits = (
            [("vgg8", "eager", "2")],
            ["--rounds", "2", "--seconds", "0", "--sizes", "16"],
        )
    steps = []
    for network, mode, sizes in cases:
        name = f"bench-{network}-{mode}" + ("" if "," in sizes else f"-b{sizes}")
        command = ["-m", "kernelnorm", "bench", "--device", options.device, "--passes", "train"]
        command += ["--norms", "none,batch,kernel", "--networks", network, "--modes", mode]
        command += ["--batch-sizes", sizes, *limits, "--out", str(options.folder / name)]
        steps.append(Step(name, python(*command)))
    return steps


def train(options: argparse.Namespace) -> list[Step]:
    command = ["-m", "kernelnorm", "sweep"]
    if options.dry:
        command += ["digits-vgg8", "--norms", "batch,kernel", "--batch-sizes", "32,8"]
        command += ["--epochs", "1", "--subset", "60", "--image-size", "8", "--jobs", "2"]
    else:
        command += ["cifar10-vgg8", "--norms", "kernel,batch,group,layer"]
        command += ["--batch-sizes", "256,32", "--data-dir", str(options.data)]
        command += ["--compile", "--jobs", "8"]
    command += ["--accelerator", options.device, "--out", str(options.runs)]
    return [Step("train", python(*command))]


PIECES = {"suite": suite, "primitives": primitives, "bench": bench, "train": train}


def run(step: Step, seconds: float, folder: Path, environment: dict[str, str]) -> str:
    """Run a step, and tell how it ended: ``ok``, ``failed`` or ``out of time``."""
    with (folder / f"{step.name}.txt").open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return "failed" if process.wait(seconds) else "ok"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # tests and sweeps print their results
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return "out of time"
        finally:
            with suppress(ProcessLookupError):  # also ends its child processes
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def has_data(options: argparse.Namespace) -> bool:
    """True if there is CIFAR-10 to train on; prints a line otherwise."""
    try:
        from kernelnorm.experiments.data import load_images
        from kernelnorm.experiments.errors import DataError
    except ImportError as error:
        print(f"train: skipped, {error}")
        return False
    try:
        load_images("cifar10", "test", data_dir=options.data, subset=10, download=False)
    except DataError as error:
        print(f"train: skipped, {error}")
        return False
    return True


def keep_metrics(runs: Path, folder: Path) -> None:
    """Copy the metrics and options of the runs, which the page shows, but no checkpoints."""
    for file in runs.glob("*/metrics.jsonl"):
        place = folder / "train" / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "config.yaml"):
            shutil.copy(file.with_name(name), place)


def run_piece(piece: str, options: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    """Run the steps of a piece, and return the names of those that failed."""
    folder, failed = options.folder, []
    deadline = time.monotonic() + (options.seconds or (600 if options.dry else SECONDS[piece]))
    for step in PIECES[piece](options):
        record = json.loads((folder / "steps.json").read_text())
        if options.goes_on and record.get(step.name, {}).get("status") == "ok":
            continue
        start, left = time.monotonic(), deadline - time.monotonic()
        print(f"{step.name} ... ", end="", flush=True)
        status = run(step, left, folder, environment) if left > 0 else "not begun"
        seconds = round(time.monotonic() - start, 1)
        print(f"{status}, {seconds} s" + ", see its .txt" * (status == "failed"), flush=True)
        failed += [step.name] * (status == "failed" or (options.dry and status != "ok"))
        if status != "not begun" or step.name not in record:
            record[step.name] = {"status": status, "seconds": seconds}
        (folder / "steps.json").write_text(json.dumps(record, indent=1) + "\n")
        if piece == "train":
            keep_metrics(options.runs, folder)
        write_page(folder, options.title)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"{', '.join(PIECES)} (all)")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU, about a minute")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with CIFAR-10")
    parser.add_argument("--seconds", type=float, help=f"time limit of each piece ({SECONDS})")
    parser.add_argument("--out", type=Path, help="default: docs/results/gpu; with --dry build/gpu")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of missing packages")
    parser.add_argument(
        "--continue", action="store_true", dest="goes_on", help="skip steps that succeeded before"
    )
    options = parser.parse_args()
    for piece in options.pieces:
        if piece not in PIECES:
            parser.error(f"unknown piece {piece!r}: choose from {', '.join(PIECES)}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA GPU here; --dry runs toy sizes on the CPU")

    options.device = "cpu" if options.dry else "cuda"
    name = "dry run" if options.dry else torch.cuda.get_device_name()
    out = options.out or ROOT / ("build/gpu" if options.dry else "docs/results/gpu")
    options.folder = out.absolute() / re.sub(r"[^a-z0-9]+", "-", name.lower())
    options.runs = ROOT / "runs" / "gpu-check" / options.folder.name
    options.title = f"{name}, PyTorch {torch.__version__}"
    options.data = options.data.expanduser().absolute()
    if not options.goes_on and "train" in (options.pieces or PIECES):
        shutil.rmtree(options.runs, ignore_errors=True)  # a sweep would skip finished runs
        shutil.rmtree(options.folder / "train", ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "steps.json").exists():
        (options.folder / "steps.json").write_text("{}\n")

    with tempfile.TemporaryDirectory() as unpacked:
        for wheel in sorted(options.wheels.glob("*.whl")) if options.wheels else []:
            zipfile.ZipFile(wheel).extractall(unpacked)
        sys.path[:0] = paths = [str(ROOT), unpacked]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment.setdefault("OMP_NUM_THREADS", "4")  # several programs run at once
        failed = []
        for piece in options.pieces or PIECES:
            if piece != "train" or options.dry or has_data(options):
                failed += run_piece(piece, options, environment)
    print(f"Results: {options.folder / 'README.md'}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
