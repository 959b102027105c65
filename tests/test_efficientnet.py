"""EfficientNet-B0: the original's tensors, and its stochastic depth."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernelnorm.models import efficientnet_b0
from kernelnorm.models.efficientnet import EfficientNet, MBConv, StochasticDepth

Tensors = Iterator[tuple[str, tuple[int, ...]]]
STAGES = {  # of the paper's Table 1: expansion, kernel size, channels, blocks
    1: (1, 3, 16, 1),
    2: (6, 3, 24, 2),
    3: (6, 5, 40, 2),
    4: (6, 3, 80, 3),
    5: (6, 5, 112, 3),
    6: (6, 5, 192, 4),
    7: (6, 3, 320, 1),
}


def on_meta(**options: object) -> EfficientNet:
    """The network without memory for its parameters: enough for names and shapes."""
    with torch.device("meta"):
        return efficientnet_b0(**options)


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
    yield from conv_norm("features.0", 32, 3, 3)
    channels = 32
    for stage, (expansion, size, after, depth) in STAGES.items():
        for index in range(depth):
            block, width, part = f"features.{stage}.{index}.block", channels * expansion, 0
            if expansion > 1:
                yield from conv_norm(f"{block}.0", width, channels, 1)
                part = 1
            yield from conv_norm(f"{block}.{part}", width, 1, size)
            yield from gate(f"{block}.{part + 1}", width, channels // 4)
            yield from conv_norm(f"{block}.{part + 2}", after, width, 1)
            channels = after
    yield from conv_norm("features.8", 1280, 320, 1)
    yield "classifier.1.weight", (1000, 1280)
    yield "classifier.1.bias", (1000,)


def test_with_batch_norm_the_tensors_are_torchvisions():
    state = on_meta(norm="batch").state_dict()
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(torchvisions())


def test_with_batch_norm_it_has_the_known_number_of_parameters():
    assert sum(p.numel() for p in on_meta(norm="batch").parameters()) == 5_288_548


@pytest.mark.parametrize(("small", "side"), [(False, 2), (True, 8)])
def test_it_halves_the_resolution_five_times_or_three(small: bool, side: int):
    network = on_meta(small_images=small)
    assert network.features(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1280, side, side)


def test_stochastic_depth_rises_from_0_towards_its_argument():
    network = on_meta(stochastic_depth=0.32)
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
