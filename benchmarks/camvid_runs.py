"""Plans and trains the runs of the study on CamVid.

The learning rate is the best one on the validation images for the first seed; the other seeds use
it. The search begins with three rates, and goes on until the next lower and the next higher rate
are worse than the best.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from camvid_networks import EXAMPLE, build
from torch import Tensor, nn

from kernelnorm.experiments.tuning import best_rate, rates_to_try

RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)
FIRST_RATE = 0.001
EPOCHS = 24
SEEDS = (0, 1, 2)
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Run:
    """One training."""

    network: str
    norm: str
    batch_size: int
    rate: float
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        """The name of the checkpoint, without its suffix."""
        return "-".join(map(str, asdict(self).values()))


Results = dict[Run, dict[str, list[float]]]
"""The IoU of each class, by split."""

STAGES: tuple[tuple[str, int, tuple[str, ...], tuple[int, ...]], ...] = (
    ("unet", 1, ("group", "kernel"), SEEDS),
    ("unet", 8, ("kernel",), SEEDS),
    ("unet", 1, ("ws_group",), SEEDS),
    ("unet", 2, ("kernel", "group"), SEEDS),
    ("fcdensenet", 1, ("kernel", "group"), SEEDS[:1]),
    ("unet", 1, ("batch",), SEEDS),
    ("unet", 8, ("group", "batch"), SEEDS[:1]),
    ("unet", 2, ("batch", "ws_group"), SEEDS[:1]),
    ("unet", 1, ("kernel_p0",), SEEDS[:1]),
    ("fcdensenet", 1, ("batch",), SEEDS[:1]),
)
"""Networks, batch sizes, norms and seeds, in the order in which they are trained."""


def mean_iou(result: dict[str, list[float]], split: str) -> float:
    return 100 * statistics.fmean(result[split])


def tuning_runs(network: str, batch_size: int, norms: Iterable[str]) -> list[Run]:
    """Return the runs of the first seed at all rates, from which the best rate is chosen."""
    return [
        Run(network, norm, batch_size, rate, SEEDS[0], EPOCHS) for norm in norms for rate in RATES
    ]


def scores(results: Results, network: str, norm: str, batch_size: int) -> dict[float, float]:
    """Return the mean IoU on the validation images for the first seed, by learning rate."""
    tried = [run for run in tuning_runs(network, batch_size, [norm]) if run in results]
    return {run.rate: mean_iou(results[run], "val") for run in tried}


def next_run(results: Results) -> Run | None:
    """Return the run to train next: the rates of a stage come before its other seeds."""
    for network, batch_size, norms, seeds in STAGES:
        for norm in norms:
            tried = scores(results, network, norm, batch_size)
            for rate in rates_to_try(RATES, FIRST_RATE, tried):
                return Run(network, norm, batch_size, rate, SEEDS[0], EPOCHS)
        for seed in seeds:
            for norm in norms:
                best = best_rate(scores(results, network, norm, batch_size))
                assert best is not None
                run = Run(network, norm, batch_size, best, seed, EPOCHS)
                if run not in results:
                    return run
    return None


def read_results(folder: Path) -> Results:
    file = folder / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    entries = [json.loads(line) for line in lines]
    return {Run(**entry["run"]): entry["iou"] for entry in entries}


Data = dict[str, tuple[Tensor, Tensor]]


def load(archive: Path | None) -> Data:
    data = {split: EXAMPLE["load"](archive, split) for split in ("train", "val", "test")}
    return {
        split: (images.contiguous(memory_format=torch.channels_last), masks)
        for split, (images, masks) in data.items()
    }


def train(run: Run, data: Data, folder: Path) -> nn.Module:
    """Return the trained network; resume at the last epoch that is in the checkpoint.

    An epoch depends only on the weights, the state of the optimizer, the seed and its number.
    """
    torch.manual_seed(run.seed)
    network = build(run.network, run.norm).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    checkpoint, first = folder / f"{run.name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    for epoch in range(first, run.epochs):
        start = time.process_time()
        seed = 1000 * run.seed + epoch
        torch.manual_seed(seed)
        for group in optimizer.param_groups:
            group["lr"] = run.rate * (1 + math.cos(math.pi * epoch / run.epochs)) / 2
        EXAMPLE["train_epoch"](network, optimizer, *data["train"], run.batch_size, seed)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "epoch": epoch + 1}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        print(f"{run.name}: epoch {epoch + 1}, {time.process_time() - start:.1f} s", flush=True)
    return network


def run_missing(archive: Path | None, folder: Path, limit: int) -> None:
    """Train up to ``limit`` of the missing runs."""
    folder.mkdir(parents=True, exist_ok=True)
    data = load(archive)
    for _ in range(limit):
        run = next_run(read_results(folder))
        if run is None:
            print("all runs are done")
            return
        network = train(run, data, folder)
        iou = {split: EXAMPLE["ious"](network, *data[split]).tolist() for split in ("val", "test")}
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps({"run": asdict(run), "iou": iou}) + "\n")
        print(f"{run.name}: mean IoU {mean_iou(iou, 'val'):.1f} % on validation images", flush=True)
