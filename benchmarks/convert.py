"""Trains networks of torchvision and timm at batch size 2, with BatchNorm and converted.

    python benchmarks/convert.py IMAGENETTE_FOLDER
    python benchmarks/convert.py CIFAR10_FOLDER --image-size 32 --networks vgg16_bn
    python benchmarks/convert.py --table

The search for a learning rate begins with 0.001, 0.003 and 0.01, and goes on until the next lower
and the next higher rate are worse than the best. Each run is a line of the file ``--results``; runs
that have a line are not repeated, so the same command continues after an interruption. Needs
torchvision and timm in addition to ``kernelnorm[experiments]``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import product
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

from kernelnorm import convert
from kernelnorm.experiments.data import Augment, Images, Preprocess, batches, load_images
from kernelnorm.experiments.heap import keep_freed_memory
from kernelnorm.experiments.tuning import rates_to_try
from kernelnorm.models import init_convolutions

NETWORKS = [
    *("mobilenet_v3_small", "resnet18", "shufflenet_v2_x1_0", "fasternet_t0", "googlenet"),
    *("regnet_y_400mf", "efficientnet_b0", "resnet50", "vgg16_bn"),
]
RATES = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]
FIRST_RATE = 0.003
BATCH_SIZE, CLASSES = 2, 10


def make_network(name: str, norm: str, image_size: int) -> nn.Module:
    """Return a network with random weights; for ``kernel``, the same network converted.

    BatchNorm makes the scale of the weights before it irrelevant, so networks draw them in many
    ways. In a KNConvNet the scale matters, so the weights of its convolutions are drawn again.
    VGG16 gets the head that is usual for small images, one linear layer on the mean of the last
    map, since its own three linear layers have 120 million weights.
    """
    network: nn.Module
    if name in torchvision.models.list_models(module=torchvision.models):
        options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        network = torchvision.models.get_model(name, num_classes=CLASSES, **options)
        if name.startswith("vgg"):
            network.avgpool, network.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, CLASSES)
    else:
        network = timm.create_model(name, num_classes=CLASSES)
    if norm == "kernel":
        network, report = convert(network, torch.zeros(1, 3, image_size, image_size), inplace=True)
        assert not report.unconverted, report
        init_convolutions(network, "fan_in")
    return network.to(memory_format=torch.channels_last)


def accuracy(network: nn.Module, images: Images, preprocess: Preprocess) -> float:
    """The fraction of correct predictions."""
    network.eval()
    with torch.no_grad():
        correct = sum(
            (network(x).argmax(1) == y).sum().item()
            for x, y in batches(images, 50, train=False, preprocess=preprocess)
        )
    network.train()
    return correct / len(images)


def train(run: dict, data: list[Images]) -> float | None:
    """Train with SGD and a cosine of learning rates; return the accuracy on the test images.

    Returns ``None`` if the training diverged: a loss was not finite.
    """
    torch.manual_seed(run["seed"])
    network = make_network(run["network"], run["norm"], run["image_size"]).train()
    images, test = data
    preprocess, augment = Preprocess.standardise(images), Augment(crop=True, flip=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=run["rate"], momentum=0.9, fused=True)
    steps = run["epochs"] * len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 200) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    title = "{network} {norm} {rate} seed {seed}".format(**run)
    with tqdm(total=steps, desc=title, mininterval=5) as bar:
        for epoch in range(run["epochs"]):
            for x, y in batches(
                images, BATCH_SIZE, train=True, seed=run["seed"], epoch=epoch, augment=augment,
                preprocess=preprocess,
            ):  # fmt: skip
                loss = F.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), y)
                if not torch.isfinite(loss):
                    return None
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
    return accuracy(network, test, preprocess)


def rates_tried(results: list[dict], **run: object) -> dict[float, float]:
    """Return the accuracies of the first seed, by learning rate; minus infinity if it diverged."""
    return {
        result["rate"]: -math.inf if result["accuracy"] is None else result["accuracy"]
        for result in results
        if result["seed"] == 0 and run.items() <= result.items()
    }


def print_table(results: list[dict]) -> None:
    """Print the accuracies of each network and norm, by learning rate."""
    rates = sorted({result["rate"] for result in results})
    print("| network | image size | norm |" + "".join(f" {rate} |" for rate in rates))
    print("|---|---:|---|" + "---:|" * len(rates))
    sizes = sorted({result["image_size"] for result in results})
    for name, size, norm in product(NETWORKS, sizes, ["batch", "kernel"]):
        if tried := rates_tried(results, network=name, norm=norm, image_size=size):
            cells = [_cell(tried.get(rate)) for rate in rates]
            print(f"| {name} | {size} | {norm} |" + "".join(f" {cell} |" for cell in cells))


def _cell(accuracy: float | None) -> str:
    """Return a cell of the table; ``None`` is a rate that was not tried."""
    if accuracy is None:
        return "-"
    return f"{100 * accuracy:.1f}" if math.isfinite(accuracy) else "diverged"


def main() -> None:
    """Train the runs that the file of results lacks, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="images: a folder for each class")
    parser.add_argument("--networks", type=lambda text: text.split(","), default=NETWORKS)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("runs/convert/results.jsonl"),
        help="a line for each run; its accuracy is null if it diverged (default: %(default)s)",
    )
    parser.add_argument("--table", action="store_true", help="print the results, train nothing")
    options = parser.parse_args()

    def results() -> list[dict]:
        lines = options.results.read_text().splitlines() if options.results.exists() else []
        return [json.loads(line) for line in lines]

    if options.table:
        print_table(results())
        return
    if options.folder is None:
        parser.error("give the folder of images, or --table")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    data = [
        load_images(options.folder, split, image_size=options.image_size, subset=subset)
        for split, subset in (("train", 2000), ("test", 1000))
    ]
    for name, norm in product(options.networks, ["batch", "kernel"]):
        run = {"network": name, "norm": norm, "image_size": options.image_size, "epochs": 4}
        while rates := rates_to_try(RATES, FIRST_RATE, rates_tried(results(), **run)):
            start = time.time()
            trained = {**run, "rate": rates[0], "seed": 0}
            trained["accuracy"] = train(trained, data)
            trained["seconds"] = round(time.time() - start)
            with options.results.open("a") as file:
                file.write(json.dumps(trained) + "\n")


if __name__ == "__main__":
    main()
