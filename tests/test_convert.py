"""``convert``: any network becomes a KNConvNet, and stays the network that it was."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import kernelnorm
from kernelnorm import KernelNorm1d, KernelNorm2d, KernelNorm3d, KNConv1d, KNConv2d, KNConv3d
from kernelnorm.experiments.bench import saved_bytes
from kernelnorm.models import create_model

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def conv_norm_relu(in_channels: int, out_channels: int, inplace: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace),
    )


class Block(nn.Module):
    """A residual block with one ReLU module for all, and an addition in place."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.inplace:
            y += x
        else:
            y = y + x
        out: Tensor = self.relu(y)
        return out


class PreActivation(nn.Module):
    """Norm, ReLU, convolution, twice, beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        return x + y


class Calling(nn.Module):
    """Layers, and a function that calls them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def convert(model: nn.Module, x: Any = IMAGE, **options: Any) -> tuple[Any, kernelnorm.Report]:
    """Converts, and checks that the result runs forward and backward with one image."""
    names = [name for name, _ in model.named_modules()]
    network, report = kernelnorm.convert(model, x, **options)
    assert type(network) is type(model)
    assert {*names} <= {name for name, _ in network.named_modules()}
    if isinstance(x, Tensor):
        network(x[:1]).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        network.zero_grad()
    return network, report


def why(report: kernelnorm.Report, name: str) -> str:
    return next(row.why for row in report.rows if row.name == name)


# ---- the networks of kernelnorm.models


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("vgg8", {}),
        ("resnet18", {}),
        ("resnet18", {"residual_relu": "sum", "dropout_p": 0.2}),
        ("resnet18", {"residual_relu": "both", "evaluation": "plain"}),
        ("resnet18", {"head": False}),
        pytest.param("resnet50", {"head_dropout_p": 0.4}, marks=pytest.mark.slow),
        ("mobilenet_v3_small", {}),
        pytest.param("efficientnet_b0", {}, marks=pytest.mark.slow),
        pytest.param("densenet121", {}, marks=pytest.mark.slow),
    ],
)
def test_batch_norm_twin_becomes_the_kernel_network(name: str, rules: dict[str, Any]):
    network, report = convert(create_model(name, norm="batch", num_classes=4), rules=rules)
    kernel = create_model(name, num_classes=4, rules=rules)
    assert not report.unconverted
    with torch.no_grad():
        for bias in (p for p in network.parameters() if p.dim() == 1):
            bias.normal_()
    kernel.load_state_dict(network.state_dict())
    for training in (False, True):
        outputs = []
        for one in (network.train(training), kernel.train(training)):
            torch.manual_seed(0)
            outputs.append(one(IMAGE))
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    assert saved_bytes(network, IMAGE) == saved_bytes(kernel, IMAGE)


# ---- what stays as it was


def test_the_model_is_left_alone():
    model = nn.Sequential(conv_norm_relu(3, 8), Block(), nn.Dropout(0.5))
    model[0].eval()
    before, modes = copy.deepcopy(model), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    kernelnorm.convert(model, IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert repr(model) == repr(before)
    for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_inplace_keeps_the_module_and_its_weights():
    model = conv_norm_relu(3, 8)
    weight, number = model[0].weight, weight_copy(model)
    network, _ = convert(model, inplace=True)
    assert network is model
    assert model[0].weight is weight
    assert torch.equal(weight, number)
    assert isinstance(model[0], KNConv2d)
    assert torch.equal(model[0].bias, torch.zeros(8))


def weight_copy(model: nn.Sequential) -> Tensor:
    return model[0].weight.detach().clone()


def test_keeps_modes_dtype_memory_format_and_frozen_weights():
    model = nn.Sequential(conv_norm_relu(3, 8), conv_norm_relu(8, 4)).double()
    model.to(memory_format=torch.channels_last)
    model[0].eval().requires_grad_(False)
    network, _ = kernelnorm.convert(model, IMAGE.double())
    assert [module.training for module in network[0]] == [False, False, False]
    assert [module.training for module in network[1]] == [True, True, True]
    assert not any(parameter.requires_grad for parameter in network[0].parameters())
    assert all(parameter.requires_grad for parameter in network[1].parameters())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
    assert network[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_keeps_hooks_of_convolutions_norms_and_activations():
    model, calls = conv_norm_relu(3, 8), []
    for i, layer in enumerate(model):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    network, _ = kernelnorm.convert(model, IMAGE, inplace=True)
    calls.clear()
    network(IMAGE)
    assert calls == [0, 1, 2]


def test_state_dict_has_the_names_of_the_convolutions():
    network, _ = convert(nn.Sequential(conv_norm_relu(3, 8), Block()))
    assert [*network.state_dict()] == [
        *("0.0.weight", "0.0.bias"),
        *("1.conv1.weight", "1.conv1.bias", "1.conv2.weight", "1.conv2.bias"),
    ]


def test_every_alias_of_a_module_is_converted():
    block = conv_norm_relu(3, 8)

    def forward(self: Any, x: Tensor) -> Tensor:
        for layer in self.hidden[0]:  # a list that is not registered
            x = layer(x)
        return x

    model = Calling(forward, all_layers=block, conv=block[0], norm=block[1])
    model.hidden = [[*block]]
    network, _ = convert(model, inplace=True)
    assert isinstance(network.conv, KNConv2d)
    assert network.conv is network.all_layers[0] is network.hidden[0][0]
    assert isinstance(network.norm, nn.Identity)
    assert network.norm is network.hidden[0][1]


def test_shared_layers_stay_shared():
    shared = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    network, report = convert(nn.Sequential(conv_norm_relu(3, 8), shared, shared))
    assert network[1] is network[2]
    assert network[1][0].activation == "relu"
    assert not report.unconverted


def test_converted_network_can_be_copied_and_saved(tmp_path: Any):
    network, _ = convert(nn.Sequential(conv_norm_relu(3, 8), Block(), nn.AdaptiveAvgPool2d(1)))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    twin = copy.deepcopy(network)
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(twin.eval()(IMAGE), network.eval()(IMAGE))


# ---- activations


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
    "uses",
    [
        lambda s, y: (s.relu(y), y),
        lambda s, y: torch.cat([y, s.up(s.relu(s.pool(y)))], 1),
        lambda s, y: s.relu(y.chunk(2, 1)[0]) + y.chunk(2, 1)[1].tanh(),
        lambda s, y: s.relu(y * -1),
        lambda s, y: s.relu(y / -2),
        lambda s, y: s.relu(3 + y),
        lambda s, y: s.relu(y + y.mean(1, keepdim=True)) + y,
        lambda s, y: s.relu(y * y.tanh()),
        lambda s, y: s.relu(torch.add(y, y, alpha=-2)),
        lambda s, y: s.relu(F.pad(y, [1, 1, 1, 1], value=-1.0)),
    ],
)
def test_a_relu_moves_only_if_nothing_else_sees_the_difference(uses: Callable[[Any, Tensor], Any]):
    """The same network with the ReLU where it was gives the same output."""
    layers = {**copy.deepcopy(CONV), "pool": nn.MaxPool2d(2), "up": nn.Upsample(scale_factor=2)}
    model = Calling(lambda s, x: uses(s, s.bn(s.conv(x))), **layers)
    network, report = kernelnorm.convert(model, IMAGE, rules={"head": False})
    expected = copy.deepcopy(network)
    expected.conv.activation, expected.relu = None, nn.ReLU()
    outputs = (one.eval()(IMAGE) for one in (network, expected))
    torch.testing.assert_close(*outputs)
    assert isinstance(network.relu, nn.ReLU), str(report)


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


# ---- which convolutions


def test_gates_and_classifiers_stay():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        gate = torch.sigmoid(self.expand(F.relu(self.squeeze(self.pool(y)))))
        return self.classifier(self.pool(y * gate)).flatten(1)

    model = Calling(
        forward, conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), relu=nn.ReLU(),
        squeeze=nn.Conv2d(8, 2, 1), expand=nn.Conv2d(2, 8, 1), classifier=nn.Conv2d(8, 5, 1),
        pool=nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    network, report = convert(model)
    for name in ("squeeze", "expand", "classifier"):
        assert type(getattr(network, name)) is nn.Conv2d
        assert why(report, name) == "no norm belongs to it"
    assert not report.unconverted


def test_norm_of_a_transposed_convolution_becomes_a_kernel_norm():
    model = nn.Sequential(conv_norm_relu(3, 8), nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8))
    network, report = convert(model)
    assert type(network[1]) is nn.ConvTranspose2d
    assert isinstance(network[2], KernelNorm2d)
    assert network[2].kernel_size == (1, 1)
    assert not report.unconverted


def test_convolution_of_tiny_windows_stays():
    network, report = convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    assert type(network[0]) is nn.Conv2d
    assert isinstance(network[1], KernelNorm2d)
    assert why(report, "0") == "its windows have 3 elements"


class WeightStandardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def parametrized() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3)
    parametrize.register_parametrization(conv, "weight", nn.Identity())
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (lambda: WeightStandardized(8, 8, 3), "WeightStandardized has a forward of its own"),
        (parametrized, "ParametrizedConv2d is parametrised"),
    ],
)
def test_unknown_convolutions_are_named(conv: Callable[[], nn.Module], reason: str):
    model = nn.Sequential(conv_norm_relu(3, 8), conv(), nn.BatchNorm2d(8), nn.ReLU())
    network, report = convert(model)
    assert [(row.name, row.why) for row in report.unconverted] == [("1", reason)]
    assert isinstance(network[2], KernelNorm2d)
    assert isinstance(network[3], nn.ReLU)


class ReLUNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_unknown_norms_are_named_and_left_with_their_convolution():
    network, report = convert(nn.Sequential(conv_norm_relu(3, 8), nn.Conv2d(8, 8, 3), ReLUNorm(8)))
    assert type(network[1]) is nn.Conv2d
    assert isinstance(network[2], ReLUNorm)
    assert report.unconverted[0].why == "ReLUNorm has a forward of its own"


def test_forward_of_an_instance_is_an_obstacle():
    model = conv_norm_relu(3, 8)
    model[0].forward = lambda x: F.conv2d(x, model[0].weight, padding=1)
    _, report = convert(model, inplace=True)
    assert report.unconverted[0].why == "this Conv2d has a forward of its own"


class Conv2dSame(nn.Conv2d):
    """Padded like TensorFlow's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [0, 1, 0, 1]), self.weight, self.bias, self.stride)


def test_conv2d_same_becomes_a_knconv_with_the_same_padding():
    network, _ = convert(nn.Sequential(Conv2dSame(3, 8, 3, stride=2), nn.BatchNorm2d(8)))
    plain = KNConv2d(3, 8, 3, stride=2)
    plain.load_state_dict(network[0].state_dict())
    expected = plain.eval()(F.pad(IMAGE, [0, 1, 0, 1]))
    torch.testing.assert_close(network.eval()(IMAGE), expected)


@pytest.mark.parametrize(
    ("d", "kn_conv", "kernel_norm"),
    [(1, KNConv1d, KernelNorm1d), (2, KNConv2d, KernelNorm2d), (3, KNConv3d, KernelNorm3d)],
)
def test_sequences_images_and_volumes(d: int, kn_conv: Any, kernel_norm: Any):
    conv, norm = getattr(nn, f"Conv{d}d"), getattr(nn, f"BatchNorm{d}d")
    x = torch.randn(2, 4, *[9, 8, 7][:d])
    model = nn.Sequential(norm(4), nn.Tanh(), nn.Tanh(), conv(4, 8, 3), norm(8), nn.ReLU())
    for example in (x, None):
        network, report = convert(model, example)
        assert isinstance(network[3], kn_conv)
        assert not report.unconverted
        network(x).sum().backward()
    lonely, _ = kernelnorm.convert(nn.Sequential(norm(4)), x)
    assert isinstance(lonely[0], kernel_norm)


# ---- norms


class FrozenBatchNorm2d(nn.Module):
    """Shaped like torchvision's: buffers, and no number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class BatchNormAct2d(nn.BatchNorm2d):
    """Shaped like timm's: a norm that has its activation and its dropout inside."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


@pytest.mark.parametrize("x", [IMAGE, None])
def test_frozen_batch_norm_goes(x: Tensor | None):
    network, _ = convert(nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU()), x)
    assert [type(layer) for layer in network] == [KNConv2d, nn.Identity, nn.Identity]
    assert not [*network.buffers()]


def test_activation_inside_of_a_norm_is_kept():
    network, report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, nn.SiLU())))
    assert isinstance(network[1].act, nn.SiLU)
    assert next(row.after for row in report.rows if row.name == "1") == "SiLU"
    y = network[0].eval()(IMAGE)
    torch.testing.assert_close(network.eval()(IMAGE), F.silu(y))


def test_relu_inside_of_a_norm_is_fused():
    network, report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, nn.ReLU())))
    assert network[0].activation == "relu"
    assert [row.after for row in report.rows] == ["KNConv2d", "removed", "removed"]


def test_activation_of_a_norm_that_becomes_a_kernel_norm_is_kept():
    network, _ = convert(nn.Sequential(nn.ConvTranspose2d(3, 8, 3), BatchNormAct2d(8, nn.ReLU())))
    assert [type(layer) for layer in network[1]] == [KernelNorm2d, nn.Identity, nn.ReLU]


@pytest.mark.parametrize("example", [IMAGE, None])
def test_norm_without_windows_is_left_and_named(example: Tensor | None):
    model = nn.Sequential(
        conv_norm_relu(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8),
        nn.BatchNorm1d(8),
    )  # fmt: skip
    network, report = kernelnorm.convert(model, example)
    assert isinstance(network[4], nn.BatchNorm1d)
    assert [row.name for row in report.unconverted] == ["4"]
    assert "no windows" in report.unconverted[0].why


@pytest.mark.parametrize(
    ("norm", "name"), [(nn.GroupNorm(2, 8), "group"), (nn.InstanceNorm2d(8), "instance")]
)
def test_other_norms_are_converted_on_request(norm: nn.Module, name: str):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU())
    network, _ = convert(model, norms=[name])
    assert isinstance(network[0], KNConv2d)
    with pytest.raises(ValueError, match=f"It has '{name}': name these in norms"):
        kernelnorm.convert(model, IMAGE)


# ---- the KernelNorm before the pooling


def test_pooled_sum_gets_a_kernel_norm():
    model = nn.Sequential(conv_norm_relu(3, 8), Block(), nn.AdaptiveAvgPool2d(1))
    network, _ = convert(model)
    assert [type(layer) for layer in network[2]] == [KernelNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d]
    assert network[2][0].dropout_p == 0.2
    assert network[1].conv2.activation is None


def test_pooled_preactivation_norm_becomes_the_kernel_norm():
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.features(x))).mean([2, 3])

    features = nn.Sequential(conv_norm_relu(3, 8), PreActivation())
    network, _ = convert(Calling(forward, features=features, norm=nn.BatchNorm2d(8)))
    assert isinstance(network.norm, KernelNorm2d)
    assert network.norm.dropout_p == 0.2


def test_pooled_knconv_with_its_relu_gets_none():
    model = nn.Sequential(conv_norm_relu(3, 8), nn.AdaptiveAvgPool2d(1))
    network, _ = convert(model)
    assert isinstance(network[1], nn.AdaptiveAvgPool2d)


def test_pooled_knconv_with_another_activation_gets_a_kernel_norm_before_that():
    model = nn.Sequential(conv_norm_relu(3, 8), nn.AdaptiveAvgPool2d(1))
    model[0][2] = nn.Hardswish()
    network, _ = convert(model)
    assert [type(layer) for layer in network[0][2]] == [KernelNorm2d, nn.Hardswish]


def test_depthwise_convolutions_become_knconvs():
    model = nn.Sequential(conv_norm_relu(3, 8), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    network, _ = convert(model)
    assert isinstance(network[1], KNConv2d)
    assert network[1].groups == 8


# ---- without an example input


def test_order_of_registration_decides_without_an_example():
    model = nn.Sequential(conv_norm_relu(3, 8), Block(), conv_norm_relu(8, 4))
    network, report = kernelnorm.convert(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert network[0][0].activation == "relu"
    assert isinstance(network[1].relu, nn.ReLU)  # who calls it cannot be known
    assert all(row.why.endswith("(a guess)") for row in report.rows)
    assert "Pass an example_input" in str(report)
    network(IMAGE).sum().backward()


def test_layers_that_evaluation_does_not_call_are_guessed():
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.features(x)
        return y + self.auxiliary(x) if self.training else y

    model = Calling(forward, features=conv_norm_relu(3, 8), auxiliary=conv_norm_relu(3, 8))
    network, report = convert(model)
    assert isinstance(network.auxiliary[0], KNConv2d)
    assert [row.name for row in report.rows if "guess" in row.why] == [
        f"auxiliary.{i}" for i in range(3)
    ]


# ---- arguments, messages, the report


def test_examples_with_several_arguments():
    def forward(self: Any, x: Tensor, scale: Tensor) -> Tensor:
        return self.layers(x) * scale

    class Scaled(Calling):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return forward(self, x, scale)

    for example in ((IMAGE, torch.ones(1)), {"x": IMAGE, "scale": torch.ones(1)}):
        network, report = convert(Scaled(forward, layers=conv_norm_relu(3, 8)), example)
        assert network.layers[0].activation == "relu"
        assert "guess" not in str(report)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Conv2d(3, 8, 3), {}, "no norm of the kinds batch, so there is nothing"),
        (lazy, {}, r"its module '0' is lazy.*Call the model once"),
        (
            lambda: conv_norm_relu(4, 8),
            {},
            r"model cannot run on example_input \(RuntimeError: .*channels.*Pass an input",
        ),
        (lambda: conv_norm_relu(3, 8), {"norms": "batch"}, "norms must be names from batch, group"),
        (lambda: conv_norm_relu(3, 8), {"norms": ["layer"]}, "norms must be names from batch"),
        (lambda: conv_norm_relu(3, 8), {"rules": {"dropout": 1}}, "unknown rule 'dropout'"),
    ],
)
def test_messages(model: Callable[[], nn.Module], options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        kernelnorm.convert(model(), IMAGE, **options)


def test_what_is_no_module_or_scripted_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        kernelnorm.convert("resnet18", IMAGE)  # type: ignore[type-var]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that scripting is deprecated
        scripted = torch.jit.script(conv_norm_relu(3, 8))
    model = nn.Sequential(OrderedDict(part=scripted))
    with pytest.raises(TypeError, match=r"its module 'part' is scripted.*script it then"):
        kernelnorm.convert(model, IMAGE)


def test_model_that_cannot_be_copied_can_be_converted_itself():
    model = conv_norm_relu(3, 8)
    model.generator = (i for i in range(3))
    with pytest.raises(ValueError, match=r"model cannot be copied.*Pass inplace=True"):
        kernelnorm.convert(model, IMAGE)
    network, _ = kernelnorm.convert(model, IMAGE, inplace=True)
    assert isinstance(network[0], KNConv2d)


def test_converts_in_inference_mode_and_leaves_the_example():
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layers(x.mul_(2))

    x = IMAGE.clone()
    with torch.inference_mode():
        network, _ = kernelnorm.convert(Calling(forward, layers=conv_norm_relu(3, 8)), x)
    assert torch.equal(x, IMAGE)
    network(x).sum().backward()


def test_norm_with_a_layer_called_norm():
    class Named(BatchNormAct2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, nn.SiLU())
            self.norm = nn.Identity()

    network, _ = convert(nn.Sequential(nn.Conv2d(3, 8, 3), Named(8)))
    assert isinstance(network[0], KNConv2d)


def test_failed_run_leaves_the_model_as_it_was():
    model = conv_norm_relu(3, 8)
    with pytest.raises(ValueError, match="cannot run"):
        kernelnorm.convert(model, IMAGE[:, :1], inplace=True)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert model.training
    model(IMAGE)


def test_report_is_a_table():
    _, report = convert(nn.Sequential(conv_norm_relu(3, 8), nn.Conv2d(8, 2, 1)))
    assert str(report).splitlines() == [
        "module  before       after     why",
        "0.0     Conv2d       KNConv2d  rule I",
        "0.1     BatchNorm2d  removed   rule II: the KNConv normalises its input",
        "0.2     ReLU         removed   rule III: moved into the KNConv before it",
        "1       Conv2d       Conv2d    no norm belongs to it",
        "",
        "1 KNConvs, 0 KernelNorms, nothing unconverted",
        "Build the optimizer after converting: 1 parameters are new, 2 are gone.",
    ]
