"""``convert``, rule III: which activations move into KNConvs, and which stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernelnorm
from kernelnorm import KernelNorm2d
from kernelnorm.experiments.bench import saved_bytes
from tests.converting import IMAGE, Block, Calling, PreActivation, conv_norm_relu, convert, why


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_is_fused(inplace: bool):
    network, report = convert(conv_norm_relu(3, 8, inplace))
    assert network[0].activation == "relu"
    assert [row.after for row in report.rows] == ["KNConv2d", "removed", "removed"]
    assert saved_bytes(network, IMAGE) < 0.7 * saved_bytes(conv_norm_relu(3, 8, inplace), IMAGE)


def test_shared_relu_of_a_residual_block_moves_into_the_branches():
    network, report = convert(nn.Sequential(conv_norm_relu(3, 8), Block(), Block()))
    assert [type(block.relu) for block in network[1:]] == [nn.Identity, nn.Identity]
    assert all(b.conv1.activation == b.conv2.activation == "relu" for b in network[1:])
    assert "KNConvs before it" in why(report, "1.relu")


def test_addition_in_place_changes_a_copy():
    """A KNConv with a ReLU keeps its output for the backward pass."""
    model = nn.Sequential(conv_norm_relu(3, 8), Block(inplace=True))
    twin = nn.Sequential(conv_norm_relu(3, 8), Block(inplace=False))
    twin.load_state_dict(model.state_dict())
    results = []
    for one in (model, twin):
        network, report = convert(one)
        torch.manual_seed(0)
        y = network(IMAGE)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*network.parameters()])])
        copies = [row.name for row in report.rows if row.after == "Copy"]
        assert copies == (["1.bn2"] if one is model else [])
        kept = saved_bytes(network, IMAGE)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert kept == saved_bytes(convert(model)[0], IMAGE)


def test_dropout_in_place_changes_a_copy():
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.dropout(self.bn(self.conv(x))) + self.relu(self.bn(self.conv(x))))

    model = Calling(
        forward, conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), relu=nn.ReLU(),
        dropout=nn.Dropout(0.5, inplace=True),
    )  # fmt: skip
    network, report = convert(model)
    assert network.conv.activation == "relu"
    assert next(row.after for row in report.rows if row.name == "bn") == "Copy"


def test_preactivations_become_postactivations():
    layers = [conv_norm_relu(3, 8), PreActivation(), PreActivation(), nn.BatchNorm2d(8)]
    network, report = convert(nn.Sequential(*layers))
    assert network[1].conv1.activation == network[1].conv2.activation == "relu"
    assert network[2].conv1.activation == "relu"
    assert network[2].conv2.activation is None  # no ReLU follows it
    assert isinstance(network[3], KernelNorm2d)
    assert not report.unconverted
    assert not any("stays" in row.why for row in report.rows)


def test_functional_relu_stays():
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    model = Calling(forward, conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8))
    network, report = convert(nn.Sequential(model))
    assert network[0].conv.activation is None
    assert "0 calls a ReLU as a function" in str(report)
    assert (network(IMAGE) >= 0).all()


def test_leaky_relu_is_fused_after_one_convolution_and_stays_after_a_sum():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + y)

    layers = {
        "conv1": nn.Conv2d(3, 8, 3, padding=1), "bn1": nn.BatchNorm2d(8), "act1": nn.LeakyReLU(0.2),
        "conv2": nn.Conv2d(8, 8, 1), "bn2": nn.BatchNorm2d(8), "act2": nn.LeakyReLU(0.2),
    }  # fmt: skip
    network, report = convert(Calling(forward, **layers))
    assert network.conv1.activation.negative_slope == 0.2
    assert network.conv2.activation is None
    assert isinstance(network.act2, nn.LeakyReLU)
    assert "stays" in why(report, "act2")


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.ReLU6()])
def test_other_activations_stay(activation: nn.Module):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation)
    network, _ = convert(model)
    assert type(network[2]) is type(activation)
    assert network[0].activation is None


def test_relu_stays_where_its_input_has_another_use():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.cat([y, self.relu(y)], 1)

    model = Calling(
        forward, conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), relu=nn.ReLU()
    )
    network, report = convert(model)
    assert isinstance(network.relu, nn.ReLU)
    assert (network(IMAGE) < 0).any()
    assert why(report, "relu").endswith("has another use, too: what the model returns")


CONV = {"conv": nn.Conv2d(3, 8, 3, padding=1), "bn": nn.BatchNorm2d(8), "relu": nn.ReLU()}


@pytest.mark.parametrize(
    "pad",
    [
        lambda y: F.pad(y, (1, 2, 1, 2)),
        lambda y: F.pad(y, (1, 2), "constant", 0.0),
        lambda y: F.pad(y, (1, 2, 1, 2), mode="reflect"),
    ],
)
def test_a_relu_moves_through_padding(pad: Callable[[Tensor], Tensor]):
    model = Calling(lambda s, x: s.relu(pad(s.bn(s.conv(x)))), **copy.deepcopy(CONV))
    network, report = kernelnorm.convert(model, IMAGE, rules={"head": False})
    assert isinstance(network.relu, nn.Identity), str(report)
    expected = copy.deepcopy(network)
    expected.conv.activation, expected.relu = None, nn.ReLU()
    torch.testing.assert_close(network.eval()(IMAGE), expected.eval()(IMAGE))


@pytest.mark.parametrize(
    "uses",
    [
        lambda s, y: (s.relu(y), y),
        lambda s, y: torch.cat([y, s.up(s.relu(s.pool(y)))], 1),
        lambda s, y: s.relu(y.chunk(2, 1)[0]) + y.chunk(2, 1)[1].tanh(),
        lambda s, y: s.relu(y * -1),
        lambda s, y: s.relu(y / -2),
        lambda s, y: s.relu(torch.mul(y, other=-1)),
        lambda s, y: s.relu(y * np.float32(-1)),
        lambda s, y: s.relu(s.cubic(y)),
        lambda s, y: s.relu(F.interpolate(y, None, 2, "bicubic")),
        lambda s, y: s.relu(3 + y),
        lambda s, y: s.relu(y + y.mean(1, keepdim=True)) + y,
        lambda s, y: s.relu(y * y.tanh()),
        lambda s, y: s.relu(torch.add(y, y, alpha=-2)),
        lambda s, y: s.relu(F.pad(y, [1, 1, 1, 1], value=-1.0)),
        lambda s, y: s.relu(y) + F.relu(-1 * y),
        lambda s, y: s.relu(y) + F.relu(y / -2),
        lambda s, y: s.relu(y) + F.relu(y + 1),
        lambda s, y: s.relu(y) + F.relu(y * y.flip(1)),
        lambda s, y: s.relu(y) + F.relu(F.max_pool2d(-1 * y, 3, 1, 1)),
        lambda s, y: s.relu(y) + F.relu(F.avg_pool2d(y, 3, 1, 1)),
        lambda s, y: s.relu(y) + F.relu(y.mean(1, keepdim=True)),
        lambda s, y: s.relu(y) + F.relu(F.interpolate(y, None, 1.0, mode="bilinear")),
    ],
)
def test_a_relu_moves_only_if_nothing_else_sees_the_difference(uses: Callable[[Any, Tensor], Any]):
    """The same network with the ReLU where it was gives the same output."""
    layers = {**copy.deepcopy(CONV), "pool": nn.MaxPool2d(2), "up": nn.Upsample(scale_factor=2)}
    layers["cubic"] = nn.Upsample(scale_factor=2, mode="bicubic")
    model = Calling(lambda s, x: uses(s, s.bn(s.conv(x))), **layers)
    network, report = kernelnorm.convert(model, IMAGE, rules={"head": False})
    expected = copy.deepcopy(network)
    expected.conv.activation, expected.relu = None, nn.ReLU()
    outputs = (one.eval()(IMAGE) for one in (network, expected))
    torch.testing.assert_close(*outputs)
    assert isinstance(network.relu, nn.ReLU), str(report)


@pytest.mark.parametrize(
    "other",
    [
        lambda s, y: F.relu(y),
        lambda s, y: F.relu(2 * y),
        lambda s, y: F.relu(F.max_pool2d(y, 3, 1, 1)),
        lambda s, y: F.relu(s.up(y))[..., ::2, ::2],
        lambda s, y: F.relu(y * y.mean((2, 3), keepdim=True).sigmoid()),
    ],
)
def test_a_relu_moves_if_another_takes_the_same_elements(other: Callable[[Any, Tensor], Any]):
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        result: Tensor = self.relu(y) + other(self, y)
        return result

    model = Calling(forward, up=nn.Upsample(scale_factor=2), **copy.deepcopy(CONV))
    network, report = kernelnorm.convert(model, IMAGE, rules={"head": False})
    assert isinstance(network.relu, nn.Identity), str(report)


@pytest.mark.parametrize("residual_relu", ["branch", "sum"])
def test_no_relu_moves_before_a_sum_whose_own_relu_stays(residual_relu: str):
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.cat([self.relu(y + self.skip(x)), self.aux(y)], 1)

    layers = {**copy.deepcopy(CONV), "skip": nn.Conv2d(3, 8, 1), "aux": nn.ReLU()}
    rules = {"head": False, "residual_relu": residual_relu}
    network, report = kernelnorm.convert(Calling(forward, **layers), IMAGE, rules=rules)
    assert isinstance(network.relu, nn.ReLU)
    assert isinstance(network.aux, nn.ReLU)
    assert "has another use, too: relu" in why(report, "aux")


@pytest.mark.parametrize("activation", [nn.SiLU(inplace=True), nn.ReLU(inplace=True)])
def test_what_is_changed_in_place_after_a_removed_norm_is_a_copy(activation: nn.Module):
    """A norm gives a new tensor; the identity that it becomes must not give away its input."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.conv(self.act(self.bn(y))) + y

    layers = {"bn": nn.BatchNorm2d(8), "act": activation, "conv": nn.Conv2d(8, 8, 3, padding=1)}
    network, report = convert(Calling(forward, first=nn.Conv2d(3, 8, 1), **layers))
    assert next(row.after for row in report.rows if row.name == "bn") == "Copy"
    y = torch.tanh(network.first(IMAGE))
    expected = network.conv.eval()(activation(y.clone())) + y
    torch.testing.assert_close(network(IMAGE), expected)


def test_a_map_that_another_layer_changes_in_place_is_not_kept_by_its_knconv():
    """One ReLU takes a copy of the map, the other one changes the map itself."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(self.bn(self.first(x)))
        return self.relu(y).flip(-1) + self.changing(y)

    layers = {
        "first": nn.Conv2d(3, 8, 3, padding=1), "bn": nn.BatchNorm2d(8),
        "conv": nn.Conv2d(8, 8, 3, padding=1), "relu": nn.ReLU(), "changing": nn.ReLU(inplace=True),
    }  # fmt: skip
    model = Calling(forward, **layers)
    model(IMAGE).sum().backward()
    network, _ = convert(model)
    network(IMAGE).square().sum().backward()


@pytest.mark.parametrize(
    "example", [torch.empty(0, 3, 16, 16), torch.empty(2, 3, 16, 16).to("meta")]
)
def test_tensors_without_memory_are_told_apart(example: Tensor):
    """All of them have the address 0."""

    def model() -> nn.Module:
        return nn.Sequential(conv_norm_relu(3, 8), Block(), nn.AdaptiveAvgPool2d(1))

    _, expected = kernelnorm.convert(model(), IMAGE)
    with torch.device(example.device):
        _, report = kernelnorm.convert(model(), example)
    assert str(report) == str(expected)


def test_input_of_the_network_is_not_changed():
    x = IMAGE.clone()
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 8, 3))
    network, _ = convert(model)
    network(x)
    assert torch.equal(x, IMAGE)


def test_relu_with_two_uses_before_the_pooling_keeps_both():
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(x)))
        return self.pool(y), self.segment(y)

    layers = copy.deepcopy(CONV)
    layers |= {"conv2": nn.Conv2d(3, 8, 3, padding=1), "bn2": nn.BatchNorm2d(8)}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "segment": nn.Identity()}
    network, _ = kernelnorm.convert(Calling(forward, **layers), IMAGE)
    assert (network(IMAGE)[1] >= 0).all()


def test_empty_sequence_as_shortcut_is_none():
    class Shortcut(Block):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut = nn.Sequential()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.shortcut(x))

    network, report = convert(nn.Sequential(conv_norm_relu(3, 8), Shortcut()))
    assert isinstance(network[1].relu, nn.Identity), str(report)


def test_relu_stays_where_its_input_comes_from_another_layer():
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + self.linear(x))

    model = Calling(
        forward, conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), relu=nn.ReLU(),
        linear=nn.Conv2d(3, 8, 3, padding=1),
    )  # fmt: skip
    network, report = convert(model)
    assert isinstance(network.relu, nn.ReLU)
    assert (network(IMAGE) >= 0).all()
    assert why(report, "relu") == "stays: its input comes from linear, too"


def test_relu_stays_where_a_shared_convolution_is_used_without_it():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv(x)))
        return y + self.bn2(self.conv(x.flip(-1)))

    model = Calling(
        forward, conv=nn.Conv2d(3, 8, 3, padding=1), bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8),
        relu=nn.ReLU(),
    )  # fmt: skip
    network, report = convert(model)
    assert network.conv.activation is None
    assert why(report, "relu") == "stays: the KNConv is also called without it"
