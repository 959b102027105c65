"""Trains networks of torchvision and timm at batch size 2, as they are and converted.

    python benchmarks/convert.py IMAGENETTE_FOLDER
    python benchmarks/convert.py IMAGENETTE_FOLDER --networks resnet50,googlenet --seeds 0,1,2

Each run is a network, a norm, a learning rate and a seed, and a line of RESULTS; runs that have a
line are not repeated, so the same command goes on after an interruption. The table is printed at
the end. Needs torchvision and timm beside ``kernelnorm[experiments]``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
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
from kernelnorm.models import init_convolutions

NETWORKS = [
    *("mobilenet_v3_small", "resnet18", "googlenet", "shufflenet_v2_x1_0", "regnet_y_400mf"),
    *("fasternet_t0", "efficientnet_b0", "resnet50", "vgg16_bn"),
]
RATES = [0.001, 0.003, 0.01]
IMAGE_SIZE, BATCH_SIZE, CLASSES = 96, 2, 10


def make_network(name: str, norm: str) -> nn.Module:
    """Returns a network with random weights; for ``kernel``, the same network converted.

    BatchNorm makes the scale of the weights before it irrelevant, so networks draw them in many
    ways. In a KNConvNet it counts.
    """
    network: nn.Module
    if name in torchvision.models.list_models(module=torchvision.models):
        options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        network = torchvision.models.get_model(name, num_classes=CLASSES, **options)
    else:
        network = timm.create_model(name, num_classes=CLASSES)
    if norm == "kernel":
        network, report = convert(network, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), inplace=True)
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


def train(name: str, norm: str, rate: float, seed: int, epochs: int, data: list[Images]) -> float:
    """Trains with SGD and a cosine of learning rates; returns the accuracy on the test images."""
    torch.manual_seed(seed)
    network, (images, test) = make_network(name, norm).train(), data
    preprocess, augment = Preprocess.standardise(images), Augment(crop=True, flip=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    steps = epochs * len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 200) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    with tqdm(total=steps, desc=f"{name} {norm} {rate} seed {seed}", mininterval=5) as bar:
        for epoch in range(epochs):
            for x, y in batches(
                images, BATCH_SIZE, train=True, seed=seed, epoch=epoch, augment=augment,
                preprocess=preprocess,
            ):  # fmt: skip
                loss = F.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), y)
                if not torch.isfinite(loss):
                    return 1 / CLASSES
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
    return accuracy(network, test, preprocess)


def print_table(results: list[dict]) -> None:
    """Prints the best learning rate of each network and norm, and its accuracies."""
    print("| network | norm | learning rate | accuracy, % |")
    print("|---|---|---:|---:|")
    for name, norm in product(NETWORKS, ["batch", "kernel"]):
        found: dict[float, list[float]] = {}
        for result in results:
            if (result["network"], result["norm"]) == (name, norm):
                found.setdefault(result["rate"], []).append(100 * result["accuracy"])
        if found:
            rate = max(found, key=lambda rate: statistics.mean(found[rate]))
            numbers = ", ".join(f"{number:.1f}" for number in found[rate])
            print(f"| {name} | {norm} | {rate} | {numbers} |")


def main() -> None:
    """Runs what RESULTS lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", type=lambda text: text.split(","), default=NETWORKS)
    parser.add_argument("--rates", type=lambda text: [*map(float, text.split(","))], default=RATES)
    parser.add_argument("--seeds", type=lambda text: [*map(int, text.split(","))], default=[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path("runs/convert/results.jsonl"))
    options = parser.parse_args()
    keep_freed_memory()
    data = [
        load_images(options.folder, split, image_size=IMAGE_SIZE, subset=subset)
        for split, subset in (("train", 2000), ("test", 1000))
    ]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.touch()
    for name, seed, rate, norm in product(
        options.networks, options.seeds, options.rates, ["batch", "kernel"]
    ):
        run = {"network": name, "norm": norm, "rate": rate, "seed": seed, "epochs": options.epochs}
        done = [json.loads(line) for line in options.results.read_text().splitlines()]
        if any(run.items() <= result.items() for result in done):
            continue
        start = time.time()
        run["accuracy"] = train(name, norm, rate, seed, options.epochs, data)
        run["seconds"] = round(time.time() - start)
        with options.results.open("a") as file:
            file.write(json.dumps(run) + "\n")
    print_table([json.loads(line) for line in options.results.read_text().splitlines()])


if __name__ == "__main__":
    main()
