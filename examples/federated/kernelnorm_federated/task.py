"""The images, the network, its training by one client, and its test by the server."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelnorm.experiments.data import Images, Preprocess, batches, load_images
from kernelnorm.experiments.data.images import balanced
from kernelnorm.models import create_model
from kernelnorm.norms import adaptive_clip_grad_, clipped_parameters, describe
from kernelnorm_federated.settings import SettingError, Settings

TEST_BATCH_SIZE = 256


def load(settings: Settings, split: str) -> Images:
    """Return the images of ``split``, ``"train"`` or ``"test"``; a cache keeps the last four sets.

    The server tests on the images of ``"test"``. With ``test_on="held-out"`` these are training
    images that no client has.

    Raises:
        kernelnorm.experiments.data.DataError: the images are missing or damaged.
        SettingError: no images are held out.
    """
    default = 16 if settings.data == "digits" else None  # VGG8 needs more than 8
    data, data_dir = (str(Path(p).expanduser()) for p in (settings.data, settings.data_dir))

    def load_first(split: str, count: int) -> Images:
        return _load(data, split, data_dir, settings.image_size or default, count or None)

    if split == "train":
        return load_first("train", settings.train_images)
    if settings.test_on == "test":
        return load_first("test", settings.test_images)
    images = load_first("train", settings.train_images + settings.test_images)
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[balanced(images.labels, min(settings.train_images, len(images)))] = False
    if not rest.any():
        raise SettingError(
            "train-images", settings.train_images, f"fewer than all {len(images)} of them"
        )
    return replace(images, pixels=images.pixels[rest], labels=images.labels[rest])


@functools.lru_cache(4)
def _load(data: str, split: str, data_dir: str, size: int | None, subset: int | None) -> Images:
    return load_images(data, split, data_dir=data_dir, image_size=size, subset=subset)


def preprocess(settings: Settings, images: Images) -> Preprocess:
    """Return the preprocessing of the network's input.

    KernelNorm needs none, because it standardises each window. The other norms get fixed values,
    not statistics of the clients' images.
    """
    return Preprocess() if settings.norm == "kernel" else Preprocess.fixed(images)


def build(settings: Settings, images: Images) -> nn.Module:
    """Return the network for such images, with first weights that are drawn from ``seed``."""
    options = {"width": settings.width} if settings.model == "vgg8" else {}
    torch.manual_seed(settings.seed)
    return create_model(
        settings.model,
        norm=settings.layers,
        num_classes=len(images.classes),
        in_channels=images.pixels.shape[1],
        **options,
    )


def try_out(network: nn.Module, images: Images, settings: Settings) -> None:
    """Pass two images through a copy of the network, as training would.

    Raises:
        SettingError: the network cannot take such images.
    """
    x, _ = next(batches(images, 2, train=False))
    try:
        copy.deepcopy(network).train()(x)
    except (RuntimeError, ValueError) as error:
        height, width = x.shape[2:]
        raise SettingError(
            "image-size",
            settings.image_size,
            f"larger images than {width}x{height} for "
            f"{settings.model} with norm {settings.norm} ({error})",
        ) from error


def device() -> torch.device:
    """Return the GPU that Flower gave to this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def freeze_statistics(network: nn.Module) -> None:
    """Put the BatchNorm layers of a network in training into evaluation mode.

    They then normalise by their running statistics and do not update these; training of their scale
    and shift continues. This is the second stage of FixBN.

    Source: Zhong et al., "Making Batch Normalization Great in Federated Deep Learning",
    arXiv 2303.06530.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def train(
    network: nn.Module,
    images: Images,
    settings: Settings,
    *,
    server_round: int,
    client: int,
    proximal_mu: float = 0.0,
) -> float:
    r"""Train a client's copy of the network, and return the mean loss of the last epoch.

    The order of the images and the dropout masks are functions of ``seed``, ``server_round`` and
    ``client``. The loss of a batch is the cross-entropy plus FedProx's proximal term
    :math:`\frac{\mu}{2} \|w - w_t\|^2`, where :math:`w_t` are the parameters at the start.

    Args:
        network: a network with the server's state; it is trained in place.
        images: the images of the client.
        settings: the settings of the run.
        server_round: the number of the round, counted from 1.
        client: the number of the client, counted from 0.
        proximal_mu: :math:`\mu`; 0 leaves the term out.

    Raises:
        ArithmeticError: the loss or the weights are not finite after an epoch.
    """
    where = device()
    network.to(where).train()
    if settings.first_frozen_round is not None and server_round >= settings.first_frozen_round:
        freeze_statistics(network)
    parameters = [*network.parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(
        parameters, lr=settings.learning_rate, momentum=settings.momentum, foreach=True
    )
    needs_clipping, clipped = "agc" in describe(settings.layers).needs, clipped_parameters(network)
    seed = _seed(settings.seed, server_round, client)
    torch.manual_seed(seed)
    loss_sum, count = 0.0, 0
    for epoch in range(settings.local_epochs):
        loss_sum, count = 0.0, 0
        for x, y in batches(
            images,
            settings.batch_size,
            train=True,
            seed=seed,
            epoch=epoch,
            preprocess=preprocess(settings, images),
            device=where,
        ):
            loss = F.cross_entropy(network(x), y)
            loss_sum, count = loss_sum + loss.item() * len(y), count + len(y)
            if proximal_mu:
                loss = loss + proximal_mu / 2 * _squared_distance(parameters, start)
            optimizer.zero_grad()
            loss.backward()
            if needs_clipping:
                adaptive_clip_grad_(clipped)
            optimizer.step()
        if not (math.isfinite(loss_sum) and all(p.isfinite().all() for p in parameters)):
            raise ArithmeticError(
                f"training diverged: the weights of client {client} in round {server_round} are "
                f"not finite. Take a smaller learning-rate than {settings.learning_rate}"
            )
    return loss_sum / count


def _squared_distance(parameters: list[nn.Parameter], start: list[Tensor]) -> Tensor:
    return torch.stack(
        [(now - then).square().sum() for now, then in zip(parameters, start, strict=True)]
    ).sum()


def _seed(*key: int) -> int:
    """Return a seed from a hash of the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")


@torch.no_grad()
def test(network: nn.Module, images: Images, settings: Settings) -> tuple[float, float]:
    """Return the share of images that are classified correctly, and the mean cross-entropy."""
    where = device()
    network.to(where).eval()
    correct, loss = 0, 0.0
    prepare = preprocess(settings, images)
    for x, y in batches(images, TEST_BATCH_SIZE, train=False, preprocess=prepare, device=where):
        scores = network(x)
        correct += int((scores.argmax(1) == y).sum())
        loss += F.cross_entropy(scores, y, reduction="sum").item()
    return correct / len(images), loss / len(images)
