"""MobileNetV3-small: the original's tensors and constants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from kernelnorm.models import mobilenet_v3_small
from kernelnorm.models.mobilenet import MobileNetV3

Tensors = Iterator[tuple[str, tuple[int, ...]]]
BLOCKS = [  # of the paper's Table 2: kernel size, channels inside, after, and in the gate (0: none)
    (3, 16, 16, 8),
    (3, 72, 24, 0),
    (3, 88, 24, 0),
    (5, 96, 40, 24),
    (5, 240, 40, 64),
    (5, 240, 40, 64),
    (5, 120, 48, 32),
    (5, 144, 48, 40),
    (5, 288, 96, 72),
    (5, 576, 96, 144),
    (5, 576, 96, 144),
]


def on_meta(**options: object) -> MobileNetV3:
    """The network without memory for its parameters: enough for names and shapes."""
    with torch.device("meta"):
        return mobilenet_v3_small(**options)


def conv_norm(name: str, out_channels: int, in_channels: int, size: int) -> Tensors:
    yield f"{name}.0.weight", (out_channels, in_channels, size, size)
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.1.{tensor}", (out_channels,)
    yield f"{name}.1.num_batches_tracked", ()


def gate(name: str, channels: int, squeezed: int) -> Tensors:
    for conv, (after, before) in {"fc1": (squeezed, channels), "fc2": (channels, squeezed)}.items():
        yield f"{name}.{conv}.weight", (after, before, 1, 1)
        yield f"{name}.{conv}.bias", (after,)


def torchvisions() -> Tensors:
    """The tensors of torchvision's state dict, in order."""
    yield from conv_norm("features.0", 16, 3, 3)
    channels = 16
    for index, (size, width, after, squeezed) in enumerate(BLOCKS, 1):
        block, part = f"features.{index}.block", 0
        if width != channels:
            yield from conv_norm(f"{block}.0", width, channels, 1)
            part = 1
        yield from conv_norm(f"{block}.{part}", width, 1, size)
        if squeezed:
            yield from gate(f"{block}.{part + 1}", width, squeezed)
            part += 1
        yield from conv_norm(f"{block}.{part + 1}", after, width, 1)
        channels = after
    yield from conv_norm("features.12", 576, 96, 1)
    for linear, (after, before) in {0: (1024, 576), 3: (1000, 1024)}.items():
        yield f"classifier.{linear}.weight", (after, before)
        yield f"classifier.{linear}.bias", (after,)


def test_with_batch_norm_the_tensors_are_torchvisions():
    state = on_meta(norm="batch").state_dict()
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(torchvisions())


def test_with_batch_norm_it_has_the_known_number_of_parameters():
    assert sum(p.numel() for p in on_meta(norm="batch").parameters()) == 2_542_856


def test_its_batch_norms_have_the_papers_constants():
    norms = [m for m in on_meta(norm="batch").modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 34
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


@pytest.mark.parametrize(("small", "side"), [(False, 2), (True, 8)])
def test_it_halves_the_resolution_five_times_or_three(small: bool, side: int):
    network = on_meta(small_images=small)
    assert network.features(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 576, side, side)
