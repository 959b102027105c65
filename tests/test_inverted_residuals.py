"""EfficientNet-B0 and MobileNetV3-small: the originals' tensors and constants, stochastic depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import nn

from kernelnorm.models import create_model
from kernelnorm.models.efficientnet import MBConv, StochasticDepth

Tensors = Iterator[tuple[str, tuple[int, ...]]]


class Block(NamedTuple):
    """An inverted residual. One with ``squeezed=0`` has no gate."""

    name: str
    size: int
    width: int
    after: int
    squeezed: int


class Original(NamedTuple):
    """A network of inverted residuals as its authors, and torchvision, have it."""

    model: str
    blocks: list[Block]
    stem: int
    last: int
    classifier: dict[int, tuple[int, int]]
    parameters: int


def efficientnet_blocks() -> Iterator[Block]:
    """Of the paper's Table 1: expansion, kernel size, channels, blocks of each stage."""
    stages = [
        (1, 3, 16, 1), (6, 3, 24, 2), (6, 5, 40, 2), (6, 3, 80, 3),
        (6, 5, 112, 3), (6, 5, 192, 4), (6, 3, 320, 1),
    ]  # fmt: skip
    channels = 32
    for stage, (expansion, size, after, depth) in enumerate(stages, 1):
        for index in range(depth):
            name = f"features.{stage}.{index}"
            yield Block(name, size, channels * expansion, after, channels // 4)
            channels = after


def mobilenet_blocks() -> Iterator[Block]:
    """Of the paper's Table 2: kernel size, channels inside, after, and in the gate."""
    rows = [
        (3, 16, 16, 8), (3, 72, 24, 0), (3, 88, 24, 0), (5, 96, 40, 24), (5, 240, 40, 64),
        (5, 240, 40, 64), (5, 120, 48, 32), (5, 144, 48, 40), (5, 288, 96, 72), (5, 576, 96, 144),
        (5, 576, 96, 144),
    ]  # fmt: skip
    for index, row in enumerate(rows, 1):
        yield Block(f"features.{index}", *row)


EFFICIENTNET = Original(
    "efficientnet_b0",
    [*efficientnet_blocks()],
    stem=32,
    last=1280,
    classifier={1: (1000, 1280)},
    parameters=5_288_548,
)
MOBILENET = Original(
    "mobilenet_v3_small",
    [*mobilenet_blocks()],
    stem=16,
    last=576,
    classifier={0: (1024, 576), 3: (1000, 1024)},
    parameters=2_542_856,
)
each_original = pytest.mark.parametrize(
    "original", [EFFICIENTNET, MOBILENET], ids=lambda original: original.model
)


def on_meta(original: Original, **options: object) -> nn.Module:
    """The network without memory for its parameters: enough for names and shapes."""
    with torch.device("meta"):
        return create_model(original.model, num_classes=1000, **options)


def conv_norm(name: str, out_channels: int, in_channels: int, size: int) -> Tensors:
    yield f"{name}.0.weight", (out_channels, in_channels, size, size)
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.1.{tensor}", (out_channels,)
    yield f"{name}.1.num_batches_tracked", ()


def gate(name: str, channels: int, squeezed: int) -> Tensors:
    for conv, (after, before) in {"fc1": (squeezed, channels), "fc2": (channels, squeezed)}.items():
        yield f"{name}.{conv}.weight", (after, before, 1, 1)
        yield f"{name}.{conv}.bias", (after,)


def torchvisions(original: Original) -> Tensors:
    """The tensors of torchvision's state dict, in order."""
    yield from conv_norm("features.0", original.stem, 3, 3)
    channels = original.stem
    for block in original.blocks:
        parts = (f"{block.name}.block.{part}" for part in range(4))
        if block.width != channels:
            yield from conv_norm(next(parts), block.width, channels, 1)
        yield from conv_norm(next(parts), block.width, 1, block.size)
        if block.squeezed:
            yield from gate(next(parts), block.width, block.squeezed)
        yield from conv_norm(next(parts), block.after, block.width, 1)
        channels = block.after
    stage = int(block.name.split(".")[1]) + 1
    yield from conv_norm(f"features.{stage}", original.last, channels, 1)
    for index, (after, before) in original.classifier.items():
        yield f"classifier.{index}.weight", (after, before)
        yield f"classifier.{index}.bias", (after,)


@each_original
def test_with_batch_norm_the_tensors_are_torchvisions(original: Original):
    state = on_meta(original, norm="batch").state_dict()
    shapes = [(key, tuple(value.shape)) for key, value in state.items()]
    assert shapes == [*torchvisions(original)]


@each_original
def test_with_batch_norm_it_has_the_known_number_of_parameters(original: Original):
    network = on_meta(original, norm="batch")
    assert sum(p.numel() for p in network.parameters()) == original.parameters


@pytest.mark.parametrize(("small", "side"), [(False, 2), (True, 8)])
@each_original
def test_it_halves_the_resolution_five_times_or_three(original: Original, small: bool, side: int):
    network = create_model(original.model, small_images=small).eval()
    with torch.no_grad():
        features = network.get_submodule("features")(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, original.last, side, side)


def test_batch_norms_of_mobilenet_have_the_papers_constants():
    norms = [m for m in on_meta(MOBILENET, norm="batch").modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 34
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_stochastic_depth_rises_from_0_towards_its_argument():
    network = on_meta(EFFICIENTNET, stochastic_depth=0.32)
    drops = [m.stochastic_depth.p for m in network.modules() if isinstance(m, MBConv)]
    assert drops == pytest.approx([0.02 * block for block in range(16)])


def test_stochastic_depth_drops_samples_and_keeps_their_mean():
    x = torch.ones(10_000, 2, 1, 1)
    y = StochasticDepth(0.25)(x).flatten(1)
    assert torch.equal(y[:, 0], y[:, 1])
    assert set(y.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(y.mean().item() - 1) < 0.05


def test_stochastic_depth_does_nothing_in_evaluation():
    x = torch.randn(8, 2, 3, 3)
    assert torch.equal(StochasticDepth(0.5).eval()(x), x)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_stochastic_depth_refuses_what_is_no_probability(p: float):
    with pytest.raises(ValueError, match=f"p must be at least 0 and below 1, got {p}"):
        StochasticDepth(p)
