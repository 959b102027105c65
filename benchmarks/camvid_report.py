"""The results of the study on CamVid: tables, costs, a picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from camvid_networks import CLASSES, HEIGHT, NETWORKS, NORMS, WIDTH, build
from camvid_runs import (
    EPOCHS,
    RATES,
    SEEDS,
    Results,
    Run,
    load,
    mean_iou,
    read_results,
    scores,
    tuning_runs,
)
from torch import Tensor, nn

from kernelnorm.experiments.bench.measure import saved_bytes
from kernelnorm.experiments.statistics import difference, estimate
from kernelnorm.experiments.tuning import best_rate

COLOURS = {  # of the classes, in their order
    "sky": "#9BC8F0", "building": "#A05A4A", "pole": "#E8E0C0", "road": "#6B6B7B",
    "pavement": "#E3A7C7", "tree": "#4F8F3A", "sign": "#F0C419", "fence": "#B08D57",
    "car": "#2C4BA0", "pedestrian": "#D62728", "bicyclist": "#17BECF",
}  # fmt: skip


def full_runs(results: Results, network: str, norm: str, batch_size: int) -> dict[int, Run]:
    """Return the runs at the best rate, by seed."""
    best = best_rate(scores(results, network, norm, batch_size))
    runs = (Run(network, norm, batch_size, best, seed, EPOCHS) for seed in SEEDS if best)
    return {run.seed: run for run in runs if run in results}


def print_tables(folder: Path) -> None:
    """Print the results in results.jsonl as Markdown tables."""
    results = read_results(folder)
    cases = [(n, norm, size) for n in NETWORKS for norm in NORMS for size in (1, 2, 8)]
    print_accuracies(results, cases)
    print_differences(results)
    print_classes(results)
    print_rates(results, cases)


def print_accuracies(results: Results, cases: list[tuple[str, str, int]]) -> None:
    """Print the mean IoU of the last epoch, at the best rate: mean and deviation over seeds."""
    print("| network | norm | batch size | rate | seeds | validation [%] | test [%] |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for network, norm, batch_size in cases:
        if runs := full_runs(results, network, norm, batch_size):
            cells = [str(next(iter(runs.values())).rate), str(len(runs))]
            for split in ("val", "test"):
                found = estimate([mean_iou(results[run], split) for run in runs.values()])
                assert found is not None
                spread = "" if found.deviation is None else f" ± {found.deviation:.1f}"
                cells.append(f"{found.mean:.1f}{spread}")
            print(f"| {network} | {NORMS[norm]} | {batch_size} | {' | '.join(cells)} |")


def print_differences(results: Results) -> None:
    """Print differences, paired by seed, with 95 % confidence intervals."""
    print("\n| U-Net | split | difference [points] | 95 % interval |\n|---|---|---:|---:|")
    pairs = [(("kernel", b), (other, b)) for b in (1, 2) for other in ("group", "ws_group")]
    for pair in [*pairs, (("kernel", 1), ("kernel", 8))]:
        for split in ("val", "test"):
            first, second = (
                {
                    seed: mean_iou(results[run], split)
                    for seed, run in full_runs(results, "unet", *case).items()
                }
                for case in pair
            )
            found = difference(first, second)
            if found is not None and found.interval is not None:
                low, high = found.interval
                names = " - ".join(f"{NORMS[norm]} at {size}" for norm, size in pair)
                print(f"| {names} | {split} | {found.mean:+.1f} | {low:+.1f} to {high:+.1f} |")


def print_classes(results: Results, batch_size: int = 1) -> None:
    """Print the IoU of each class on the test images, the mean over seeds."""
    print(f"\n| test IoU [%], batch size {batch_size} | {' | '.join(COLOURS)} |")
    print("|---|" + "---:|" * CLASSES)
    for norm, label in NORMS.items():
        if runs := full_runs(results, "unet", norm, batch_size):
            ious = zip(*(results[run]["test"] for run in runs.values()), strict=True)
            cells = (f"{100 * statistics.fmean(values):.0f}" for values in ious)
            print(f"| {label} | {' | '.join(cells)} |")


def print_rates(results: Results, cases: list[tuple[str, str, int]]) -> None:
    """Print the mean IoU on the validation images at each rate, for the first seed."""
    print(f"\n| validation [%] | norm | batch size | {' | '.join(map(str, RATES))} |")
    print("|---|---|---:|" + "---:|" * len(RATES))
    for network, norm, batch_size in cases:
        runs = tuning_runs(network, batch_size, [norm])
        cells = [f"{mean_iou(results[r], 'val'):.1f}" if r in results else "" for r in runs]
        if any(cells):
            print(f"| {network} | {NORMS[norm]} | {batch_size} | {' | '.join(cells)} |")


def print_costs(scale: int, rounds: int = 20) -> None:
    """Print bytes kept for the backward pass and the CPU time of a step, in interleaved rounds.

    Args:
        scale: the factor by which the images are higher and wider than those of the runs
        rounds: number of timings of each step; the table has the median, without the first
    """
    height, width = scale * HEIGHT, scale * WIDTH
    print("| network | norm | batch size | kept [MB] | step [ms] | of BatchNorm |")
    print("|---|---|---:|---:|---:|---:|")
    for network in NETWORKS:
        for batch_size in (1, 2, 8):
            x = torch.rand(batch_size, 3, height, width)
            x = x.contiguous(memory_format=torch.channels_last)
            y = torch.randint(CLASSES, (batch_size, height, width))
            networks = {
                norm: build(network, norm).to(memory_format=torch.channels_last) for norm in NORMS
            }
            steps = {norm: _step(built, x, y) for norm, built in networks.items()}
            seconds: dict[str, list[float]] = {norm: [] for norm in NORMS}
            for _ in range(rounds):
                for norm, step in steps.items():
                    start = time.thread_time()
                    step()
                    seconds[norm].append(time.thread_time() - start)
            medians = {norm: statistics.median(values[1:]) for norm, values in seconds.items()}
            for norm, label in NORMS.items():
                print(
                    f"| {network} | {label} | {batch_size} | "
                    f"{saved_bytes(networks[norm], x) / 1e6:.2f} | {1000 * medians[norm]:.1f} | "
                    f"{medians[norm] / medians['batch']:.2f} |"
                )


def _step(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


COLUMNS = {"batch": "BatchNorm", "group": "GroupNorm", "kernel": "kernel, converted"}


def draw_picture(archive: Path | None, folder: Path, file: Path, batch_size: int = 1) -> None:
    """Draw test images, their masks, and the predictions of networks of the first seed."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    results, (images, masks) = read_results(folder), load(archive)["test"]
    shown = torch.linspace(0, len(images) - 1, 5).long()[1:4]
    columns = {"image": (images[shown] / 4 + 0.5).permute(0, 2, 3, 1).clamp(0, 1)}
    palette = torch.tensor([to_rgb(colour) for colour in (*COLOURS.values(), "black")])
    columns["truth"] = palette[masks[shown]]
    for norm, label in COLUMNS.items():
        rate = best_rate(scores(results, "unet", norm, batch_size))
        if rate is None:
            continue
        run = Run("unet", norm, batch_size, rate, SEEDS[0], EPOCHS)
        network = build(run.network, run.norm).to(memory_format=torch.channels_last).eval()
        state = torch.load(folder / f"{run.name}.pt", weights_only=True)
        network.load_state_dict(state["network"])
        with torch.no_grad():
            title = f"{label}\nmean IoU {mean_iou(results[run], 'test'):.1f} %"
            columns[title] = palette[network(images[shown]).argmax(dim=1)]
    figure = plt.figure(figsize=(2.1 * len(columns), 5.8), layout="constrained")
    panels = figure.subplots(len(shown), len(columns))
    for column, (title, pictures) in enumerate(columns.items()):
        panels[0, column].set_title(title, fontsize=10)
        for row, picture in enumerate(pictures):
            panels[row, column].imshow(picture.numpy(), interpolation="nearest")
            panels[row, column].set_axis_off()
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    patches.append(Patch(color="black", label="void"))
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(file, dpi=120, metadata={"Software": None})
