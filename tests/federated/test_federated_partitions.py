"""Partitions are disjoint, complete, reproducible, and as uneven as was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as options
from hypothesis import strategies as st
from kernelnorm_federated.partitions import LEAST_IMAGES, split
from kernelnorm_federated.settings import SettingError, Settings
from torch import Tensor

Make = Callable[..., Settings]
CLASSES = 10


def labels_of(images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(CLASSES, (images - CLASSES,), generator=generator)
    return torch.cat([torch.arange(CLASSES), random])


def class_counts(labels: Tensor, parts: list[Tensor]) -> Tensor:
    """Counts of shape (clients, classes)."""
    return torch.stack([labels[part].bincount(minlength=CLASSES) for part in parts])


@options(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    partition=st.sampled_from(["even", "dirichlet", "classes"]),
    clients=st.integers(1, 12),
    each=st.integers(1, CLASSES),
    alpha=st.floats(0.5, 100),
    images=st.integers(400, 600),
    seed=st.integers(0, 2**40),
)
def test_each_image_has_one_client_and_the_seed_decides_which(
    settings: Make,
    partition: str,
    clients: int,
    each: int,
    alpha: float,
    images: int,
    seed: int,
) -> None:
    each = max(each, -(-CLASSES // clients))
    choice = settings(
        partition=partition, clients=clients, classes_per_client=each, alpha=alpha, seed=seed
    )
    labels = labels_of(images, seed)
    parts = split(labels, choice)
    assert len(parts) == clients
    assert torch.cat(parts).sort().values.equal(torch.arange(images))
    assert all(part.equal(part.sort().values) for part in parts)
    assert all(a.equal(b) for a, b in zip(parts, split(labels, choice), strict=True))
    other = split(labels, replace(choice, seed=seed + 1))
    assert clients == 1 or not all(a.equal(b) for a, b in zip(parts, other, strict=True))


def test_even_parts_differ_by_one_image_at_most(settings: Make) -> None:
    sizes = {len(part) for part in split(labels_of(101), settings(clients=4))}
    assert sizes == {25, 26}


@pytest.mark.parametrize(("clients", "each"), [(10, 2), (5, 2), (7, 3), (4, 10), (25, 1)])
def test_each_client_has_its_number_of_classes_and_each_class_as_many_clients(
    settings: Make, clients: int, each: int
) -> None:
    labels = labels_of(2000)
    choice = settings(partition="classes", clients=clients, classes_per_client=each)
    counts = class_counts(labels, split(labels, choice))
    assert ((counts > 0).sum(1) == each).all()
    owners = (counts > 0).sum(0)
    assert owners.max() - owners.min() <= 1
    for column in counts.T:
        sizes = column[column > 0]
        assert sizes.max() - sizes.min() <= 1


def test_a_smaller_alpha_makes_clients_differ_more(settings: Make) -> None:
    labels = labels_of(3000)

    def largest_share(alpha: float) -> float:
        choice = settings(partition="dirichlet", clients=10, alpha=alpha)
        counts = class_counts(labels, split(labels, choice)).float()
        return float((counts.max(1).values / counts.sum(1)).mean())

    shares = [largest_share(alpha) for alpha in (0.1, 0.5, 100)]
    assert shares[0] > shares[1] + 0.1 > shares[2] + 0.2
    assert shares[2] < 0.2


def test_the_shares_of_a_class_have_the_variance_of_the_distribution(settings: Make) -> None:
    """Of a symmetric Dirichlet distribution over k shares: (k - 1) / (k^2 (k alpha + 1))."""
    alpha, clients = 1.0, 4
    labels = torch.arange(CLASSES).repeat_interleave(1000)
    shares = torch.cat(
        [
            class_counts(labels, split(labels, settings(**common, seed=seed))).flatten()
            for seed in range(100)
            for common in [{"partition": "dirichlet", "clients": clients, "alpha": alpha}]
        ]
    ).double()
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert (shares / 1000).var() == pytest.approx(expected, rel=0.1)


def test_no_client_is_left_with_a_few_images(settings: Make) -> None:
    labels = labels_of(1442)
    for seed in range(20):
        choice = settings(partition="dirichlet", clients=10, alpha=0.1, seed=seed)
        assert min(map(len, split(labels, choice))) >= LEAST_IMAGES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clients": 21}, "clients=21: expected at most 20, 10 images for each"),
        (
            {"partition": "classes", "classes_per_client": 11},
            "classes-per-client=11: expected at most 10",
        ),
        (
            {"partition": "classes", "clients": 3, "classes_per_client": 3},
            "classes-per-client=3: expected at least 4",
        ),
        (
            {"partition": "dirichlet", "clients": 20, "alpha": 0.01},
            "alpha=0.01: expected a larger one",
        ),
    ],
)
def test_impossible_partitions_are_refused(
    settings: Make, values: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        split(labels_of(200), settings(**values))


def test_a_client_with_a_single_image_is_refused(settings: Make) -> None:
    labels = torch.tensor([0] * 75 + [1])
    choice = settings(partition="classes", clients=2, classes_per_client=1)
    with pytest.raises(SettingError, match="expected at least 2 images for each client, not 1"):
        split(labels, choice)
