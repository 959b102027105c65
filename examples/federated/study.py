"""Normalisations in federated training on CIFAR-10: a study.

    python examples/federated/study.py run --data-dir data     trains the missing runs
    python examples/federated/study.py table                   prints the accuracies
    python examples/federated/study.py picture                 draws accuracy per round

The app's server and clients run in one process. Each run adds a line to results.jsonl in the
folder --out; an interrupted run resumes at its last round. The picture is the file --out with the
suffix .png. Several processes may share the work, each with another value of --batch-sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomllib
import torch
from kernelnorm_federated.local import run as run_local
from kernelnorm_federated.server_app import NoAnswerError
from kernelnorm_federated.settings import SettingError, Settings
from study_report import TUNED, draw, print_tables

from kernelnorm.experiments.data import DataError
from kernelnorm.experiments.files import Lock, write_atomically
from kernelnorm.experiments.heap import keep_freed_memory
from kernelnorm.experiments.tuning import TUNING_SEED, best_rate, rates_to_try

APP = Path(__file__).parent
NORMS = ("kernel", "batch", "fixbn", "group", "layer", "none")
PARTITIONS: dict[str, dict[str, Any]] = {
    "dirichlet-0.1": {"partition": "dirichlet", "alpha": 0.1},
    "even": {"partition": "even"},
    "dirichlet-0.5": {"partition": "dirichlet", "alpha": 0.5},
    "2-classes": {"partition": "classes", "classes_per_client": 2},
}
"""The partitions, in the order in which they are trained."""
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
FIRST_RATE = {8: 0.01, 32: 0.03}
"""Where the search begins, by batch size."""
SEEDS = (1, 2, 3)
"""Seeds of the repetitions; the other partitions have runs of the first seed only."""
MORE_SEEDS = dict.fromkeys(("kernel", "batch", "fixbn"), (4, 5, 6))
"""Further seeds of the norms that three seeds do not tell apart."""
TEST_IMAGES = 2000
"""Images on which the server tests after each round."""
LAST_ROUNDS = 3
"""Rounds whose mean accuracy is the run's result."""


@dataclass(frozen=True)
class Run:
    """One federated training."""

    partition: str
    batch_size: int
    norm: str
    rate: float
    seed: int
    rounds: int
    images: int

    @property
    def digest(self) -> str:
        """A hash of the settings, which shows whether they are those of the current program."""
        identity = self.settings(Path(), Path()).identity
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """Name of the folder of the run's state."""
        return "-".join(map(str, asdict(self).values()))

    def settings(self, data_dir: Path, out: Path) -> Settings:
        """Return the app's settings."""
        app = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
        return replace(
            Settings.from_run_config(app["config"]),
            data="cifar10",
            data_dir=str(data_dir.absolute()),
            train_images=self.images,
            test_images=TEST_IMAGES,
            test_on="held-out" if self.seed == TUNING_SEED else "test",
            clients=10,
            norm=self.norm,
            batch_size=self.batch_size,
            learning_rate=self.rate,
            seed=self.seed,
            num_server_rounds=self.rounds,
            out=str((out / self.name).absolute()),
            **PARTITIONS[self.partition],
        )


Results = dict[Run, dict[str, Any]]
"""The line of results.jsonl of each run."""


def read_results(folder: Path) -> Results:
    """Return the lines of runs whose settings are those of the current program."""
    file = folder / "results.jsonl"
    entries = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    found = {Run(**entry["run"]): entry for entry in entries}
    return {run: entry for run, entry in found.items() if entry["settings"] == run.digest}


def add_result(folder: Path, entry: dict[str, Any]) -> None:
    """Add a line to results.jsonl, to which other processes may add lines, too."""
    file = folder / "results.jsonl"
    with Lock(folder / ".lock").hold(on_wait=lambda: None):
        lines = file.read_bytes() if file.exists() else b""
        write_atomically(file, lines + json.dumps(entry).encode() + b"\n")


def score(entry: dict[str, Any]) -> float:
    """Return a run's result: its accuracy in the last rounds, minus infinity if it diverged.

    A run has diverged if a client diverged in any round.
    """
    last = entry["accuracy"][-LAST_ROUNDS:]
    return -math.inf if entry["diverged"] else sum(last) / len(last)


def scores(results: Results, run: Run) -> dict[float, float]:
    """Return the results of the runs that differ from ``run`` in the learning rate alone."""
    tried = [replace(run, rate=rate) for rate in RATES]
    return {each.rate: score(results[each]) for each in tried if each in results}


def planned(
    results: Results, batch_sizes: Sequence[int], rounds: int, images: int
) -> Iterator[Run]:
    """Yield the runs of the study that are known from the results so far, in order.

    A separate seed chooses the learning rate; the repetitions and the other partitions use it.
    """
    tuned = []
    for batch_size, norm in itertools.product(batch_sizes, NORMS):
        run = Run(TUNED, batch_size, norm, 0.0, TUNING_SEED, rounds, images)
        tried = scores(results, run)
        untried = rates_to_try(RATES, FIRST_RATE[batch_size], tried)
        yield from (replace(run, rate=rate) for rate in (*tried, *untried))
        if not untried and (best := best_rate(tried)) is not None:
            tuned.append(replace(run, rate=best))
    for partition in PARTITIONS:
        for seed in SEEDS if partition == TUNED else SEEDS[:1]:
            yield from (replace(run, partition=partition, seed=seed) for run in tuned)
    for run in tuned:
        yield from (replace(run, seed=seed) for seed in MORE_SEEDS.get(run.norm, ()))


def train(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train a run and return its line of results.jsonl."""
    settings = run.settings(args.data_dir, args.out / "states")
    start = time.process_time()
    history: list[dict[str, Any]] = []

    def say(line: str) -> None:
        print(f"{run.name}: {line}", flush=True)
        if " failed: " in line and "training diverged" not in line:
            raise RuntimeError(line)

    try:
        history = run_local(settings, say).history
    except (ArithmeticError, NoAnswerError) as error:  # clients that diverge do not answer
        print(error, flush=True)
    return {
        "run": asdict(run),
        "settings": run.digest,
        "accuracy": [entry["accuracy"] for entry in history],
        "diverged": len(history) < run.rounds
        or any(len(entry["images"]) < settings.clients for entry in history),
        "cpu_seconds": round(time.process_time() - start, 1),
        "torch": torch.__version__,
    }


def run_missing(args: argparse.Namespace) -> None:
    """Train up to ``args.limit`` of the missing runs."""
    args.out.mkdir(parents=True, exist_ok=True)
    for _ in range(args.limit):
        results = read_results(args.out)
        plan = planned(results, args.batch_sizes, args.rounds, args.images)
        run = next((run for run in plan if run not in results), None)
        if run is None:
            print("all runs are done")
            return
        entry = train(run, args)
        add_result(args.out, entry)
        shutil.rmtree(args.out / "states" / run.name, ignore_errors=True)
        print(f"{run.name}: {score(entry):.2%}, {entry['cpu_seconds']} s", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table", "picture"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of cifar10")
    out = Path("runs/federated-study")
    parser.add_argument("--out", type=Path, default=out, help="folder of results.jsonl")
    parser.add_argument("--images", type=int, default=8000, help="training images of all clients")
    parser.add_argument("--rounds", type=int, default=30)
    sizes = [*FIRST_RATE]
    parser.add_argument("--batch-sizes", type=int, nargs="+", choices=sizes, default=sizes)
    parser.add_argument("--limit", type=int, default=1000, help="maximum number of runs to train")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if min(args.images, args.rounds, args.limit) < 1:
        parser.error("--images, --rounds and --limit must be positive")
    if args.command == "run":
        try:
            run_missing(args)
        except (BlockingIOError, DataError, SettingError) as error:
            sys.exit(str(error))
        return
    results = read_results(args.out)
    wanted = planned(results, args.batch_sizes, args.rounds, args.images)
    scored = [(run, results[run], score(results[run])) for run in wanted if run in results]
    if not scored:
        parser.error(f"{args.out} has no results yet: make them with {Path(__file__).name} run")
    if args.command == "table":
        print_tables(scored)
    else:
        draw(scored, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
