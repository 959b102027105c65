"""Normalisations in federated training on CIFAR-10: a study.

    python examples/federated/study.py run --data-dir data     trains what results.jsonl lacks
    python examples/federated/study.py table                   prints the accuracies
    python examples/federated/study.py picture                 draws accuracy per round

The app's server and clients run in one process. Each run adds a line to results.jsonl; one that was
interrupted resumes at its last round. Several processes may share the work by --batch-sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomllib
import torch
from kernelnorm_federated.local import run as run_local
from kernelnorm_federated.settings import Settings
from study_report import draw, print_tables

from kernelnorm.experiments.heap import keep_freed_memory
from kernelnorm.experiments.tuning import TUNING_SEED, best_rate, rates_to_try

APP = Path(__file__).parent
RESULTS = APP.parent.parent / "docs" / "results" / "federated"
NORMS = ("kernel", "batch", "fixbn", "group", "layer", "none")
PARTITIONS: dict[str, dict[str, Any]] = {
    "dirichlet-0.1": {"partition": "dirichlet", "alpha": 0.1},
    "even": {"partition": "even"},
    "dirichlet-0.5": {"partition": "dirichlet", "alpha": 0.5},
    "2-classes": {"partition": "classes", "classes_per_client": 2},
}
"""In the order in which they are trained."""
TUNED = "dirichlet-0.1"
"""The partition on which the learning rates are chosen; its runs have three seeds."""
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
FIRST_RATE = {8: 0.01, 32: 0.03}
"""Where the search begins, by batch size."""
SEEDS = (1, 2, 3)
"""Of the repetitions; the other partitions take the first of them."""
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
"""What a line of results.jsonl says of each run."""


def read_results(folder: Path) -> Results:
    file = folder / "results.jsonl"
    entries = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return {Run(**entry["run"]): entry for entry in entries}


def score(entry: dict[str, Any]) -> float:
    """Return a run's result: its accuracy in the last rounds, minus infinity if it diverged."""
    last = entry["accuracy"][-LAST_ROUNDS:]
    return -math.inf if entry["diverged"] else sum(last) / len(last)


def scores(results: Results, run: Run) -> dict[float, float]:
    """Return the results of the runs that differ from ``run`` in the learning rate alone."""
    tried = [replace(run, rate=rate) for rate in RATES]
    return {each.rate: score(results[each]) for each in tried if each in results}


def planned(
    results: Results, batch_sizes: Sequence[int], rounds: int, images: int
) -> Iterator[Run]:
    """Yield the runs that are wanted so far, in order.

    A seed of its own chooses the learning rate; the repetitions and the other partitions take it.
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


def train(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Return the run's line of results.jsonl."""
    settings = run.settings(args.data_dir, args.out / "states")
    start = time.process_time()
    lines: list[str] = []

    def say(line: str) -> None:
        print(f"{run.name}: {line}", flush=True)
        lines.append(line)

    try:
        run_local(settings, say)
    except RuntimeError as error:  # no client has answered
        if not any("training diverged" in line for line in lines):
            raise
        print(error, flush=True)
    file = settings.folder / "rounds.jsonl"
    history = [*map(json.loads, file.read_text().splitlines() if file.exists() else [])]
    return {
        "run": asdict(run),
        "accuracy": [entry["accuracy"] for entry in history],
        "clients": [len(entry["images"]) for entry in history],
        "diverged": not (history and history[-1]["images"]),
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
        with (args.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        shutil.rmtree(args.out / "states" / run.name, ignore_errors=True)
        print(f"{run.name}: {score(entry):.2%}, {entry['cpu_seconds']} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table", "picture"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="has cifar10")
    parser.add_argument("--out", type=Path, default=RESULTS, help="has results.jsonl")
    parser.add_argument("--images", type=int, default=8000, help="of all clients together")
    parser.add_argument("--rounds", type=int, default=30)
    sizes = [*FIRST_RATE]
    parser.add_argument("--batch-sizes", type=int, nargs="+", choices=sizes, default=sizes)
    parser.add_argument("--limit", type=int, default=1000, help="runs, then stop")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if args.command == "run":
        run_missing(args)
        return
    results = read_results(args.out)
    wanted = planned(results, args.batch_sizes, args.rounds, args.images)
    scored = [
        (run, results[run], max(0.0, score(results[run]))) for run in wanted if run in results
    ]
    if args.command == "table":
        print_tables(scored)
    else:
        draw(scored, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
