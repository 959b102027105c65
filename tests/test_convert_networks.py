"""What ``convert`` keeps of a network: its function, names, aliases, hooks and modes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelnorm
from kernelnorm import KNConv2d
from kernelnorm.experiments.bench import saved_bytes
from kernelnorm.models import create_model
from tests.converting import IMAGE, Block, Calling, conv_norm_relu, convert


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("vgg8", {}),
        ("resnet18", {}),
        ("resnet18", {"residual_relu": "sum", "dropout_p": 0.2}),
        pytest.param(
            "resnet18", {"residual_relu": "both", "evaluation": "plain"}, marks=pytest.mark.slow
        ),
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


@dataclass(slots=True)
class _Output:
    scores: torch.Tensor


def test_outputs_in_a_dataclass_with_slots():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))

        def forward(self, x: torch.Tensor) -> _Output:
            return _Output(self.layers(x))

    network, report = kernelnorm.convert(Network(), torch.randn(1, 3, 8, 8))
    assert not report.unconverted
    assert network(torch.randn(1, 3, 8, 8)).scores.shape == (1, 8, 6, 6)
