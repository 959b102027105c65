"""Assigns all images to clients, each image to one; depends on the labels and a seed only."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernelnorm_federated.settings import SettingError, Settings

LEAST_IMAGES = 10
"""Least number of images of a client with ``dirichlet``, and of all clients on average."""
DRAWS = 1000
"""Maximum number of Dirichlet partitions that are drawn until each client has enough images."""


def split(labels: Tensor, settings: Settings) -> list[Tensor]:
    """Return the indices of each client's images, in ascending order.

    - ``even``: the images are shuffled and cut into parts, whose sizes differ by 1 at most.
    - ``dirichlet``: for each class, the shares of the clients are drawn from a symmetric Dirichlet
      distribution with concentration ``alpha``. Partitions are drawn until each client has at
      least 10 images. Source: Yurochkin et al., arXiv 1905.12022.
    - ``classes``: each client in turn takes the ``classes-per-client`` classes that the fewest
      clients before it have taken, ties broken at random. The images of a class are shuffled and
      cut into parts for its clients, whose sizes differ by 1 at most.

    Args:
        labels: the labels of all images, ``int64`` of shape ``(N,)``.
        settings: its ``partition``, ``clients``, ``alpha``, ``classes_per_client`` and ``seed``.

    Raises:
        SettingError: there is no such partition of these images.
    """
    names = labels.numpy()
    generator = np.random.default_rng([settings.seed, 1])
    clients = settings.clients
    if len(names) < clients * LEAST_IMAGES:
        most = len(names) // LEAST_IMAGES
        raise SettingError("clients", clients, f"at most {most}, 10 images for each")
    if settings.partition == "even":
        parts = np.array_split(generator.permutation(len(names)), clients)
    elif settings.partition == "dirichlet":
        parts = _dirichlet(names, clients, settings.alpha, generator)
    else:
        parts = _by_class(names, clients, settings.classes_per_client, generator)
    if (fewest := min(map(len, parts))) < 2:
        raise SettingError(
            "partition", settings.partition, f"at least 2 images for each client, not {fewest}"
        )
    return [torch.from_numpy(np.sort(part)) for part in parts]


def _dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(DRAWS):
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
        for images in classes:
            shares = generator.dirichlet(np.full(clients, alpha))
            cuts = np.round(len(images) * np.cumsum(shares)[:-1]).astype(int)
            for part, piece in zip(
                parts, np.split(generator.permutation(images), cuts), strict=True
            ):
                part.append(piece)
        joined = [np.concatenate(part) for part in parts]
        if min(map(len, joined)) >= LEAST_IMAGES:
            return joined
    raise SettingError(
        "alpha",
        alpha,
        f"a larger one, or fewer than {clients} clients, or more images: {DRAWS} partitions left "
        f"a client with less than {LEAST_IMAGES} images",
    )


def _by_class(
    labels: NDArray[np.int64], clients: int, each: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    classes = np.unique(labels)
    if each > len(classes):
        raise SettingError("classes-per-client", each, f"at most {len(classes)}, all classes")
    if each * clients < len(classes):
        least = -(-len(classes) // clients)
        raise SettingError(
            "classes-per-client", each, f"at least {least}: {clients} clients share all classes"
        )
    owners: list[list[int]] = [[] for _ in classes]
    for client in range(clients):
        ties = generator.permutation(len(classes))
        for number in sorted(ties, key=lambda number: len(owners[number]))[:each]:
            owners[number].append(client)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for label, own in zip(classes, owners, strict=True):
        images = generator.permutation(np.flatnonzero(labels == label))
        for client, piece in zip(own, np.array_split(images, len(own)), strict=True):
            parts[client].append(piece)
    return [np.concatenate(part) for part in parts]
