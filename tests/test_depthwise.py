"""Networks of depthwise convolutions, gates and other activations than the ReLU: their rules."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from kernelnorm.models import create_model, list_models
from kernelnorm.models.initialisation import init_convolutions
from kernelnorm.models.squeeze_excite import SqueezeExcite
from kernelnorm.modules import KernelNorm2d, KNConv2d
from kernelnorm.norms import NORMS

NETWORKS = ["mobilenet_v3_small", "efficientnet_b0"]
ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.Hardswish)
SLOW = [
    pytest.param(norm, marks=() if norm in ("batch", "kernel") else pytest.mark.slow)
    for norm in NORMS
]


def on_meta(name: str, **options: object) -> nn.Module:
    """The network without memory for its parameters: enough for its layers."""
    with torch.device("meta"):
        return create_model(name, **options)


def triples(network: nn.Module) -> dict[str, nn.Sequential]:
    """Each convolution with its norm and activation, by name; the gates' have none."""
    return {
        name: m
        for name, m in network.features.named_modules()
        if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Conv2d)
    }


@pytest.mark.parametrize("norm", SLOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient_from_one_image(name: str, norm: str):
    if name not in list_models(norm):
        pytest.skip(f"there is no {name} with norm {norm}")
    torch.manual_seed(0)  # of the 8 ReLUs in the smallest gate, all can be off
    network = create_model(name, norm=norm, num_classes=5)
    for module in network.modules():  # a block that is left out has no gradients
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    scores = network(torch.randn(1, 3, 64, 64))
    assert scores.shape == (1, 5)
    (scores * torch.randn(5)).sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_is_deterministic_and_treats_each_image_alone(name: str):
    network, images = create_model(name, num_classes=5).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together = network(images)
        assert torch.equal(together, network(images))
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_convolutions_but_the_gates_are_knconvs_the_depthwise_ones_too(name: str):
    batch, kernel = (triples(on_meta(name, norm=norm)) for norm in ("batch", "kernel"))
    assert list(batch) == list(kernel)
    for key, (conv, norm, *_) in kernel.items():
        original = batch[key][0]
        assert (type(conv), type(norm)) == (KNConv2d, nn.Identity)
        assert conv.weight.shape == original.weight.shape
        assert (conv.stride, conv.padding) == (original.stride, original.padding)
        assert conv.groups == original.groups
        assert conv.bias is not None
        assert conv.dropout_p == 0.1
    depthwise = [conv for conv, *_ in kernel.values() if conv.groups > 1]
    assert len(depthwise) == {"mobilenet_v3_small": 11, "efficientnet_b0": 16}[name]
    assert all(conv.groups == conv.in_channels for conv in depthwise)


@pytest.mark.parametrize("name", NETWORKS)
def test_rule_4s_kernel_norm_is_the_only_one(name: str):
    network = on_meta(name)
    (norm,) = (m for m in network.modules() if isinstance(m, KernelNorm2d))
    assert norm is network.head[0]
    assert (norm.kernel_size, norm.stride, norm.dropout_p) == ((1, 1), (1, 1), 0.2)
    assert not [m for m in on_meta(name, rules={"head": False}).modules() if type(m) is type(norm)]


@pytest.mark.parametrize("name", NETWORKS)
def test_no_norm_has_statistics_of_the_batch(name: str):
    assert not list(on_meta(name).buffers())


@pytest.mark.parametrize("name", NETWORKS)
def test_gates_are_ordinary_convolutions_with_biases(name: str):
    network = on_meta(name)
    gates = [m for m in network.modules() if isinstance(m, SqueezeExcite)]
    assert len(gates) == {"mobilenet_v3_small": 9, "efficientnet_b0": 16}[name]
    for conv in (conv for gate in gates for conv in (gate.fc1, gate.fc2)):
        assert type(conv) is nn.Conv2d
        assert conv.bias is not None


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_other_convolutions_have_a_bias_only_without_a_norm(name: str, norm: str):
    biased = {m[0].bias is not None for m in triples(on_meta(name, norm=norm)).values()}
    assert biased == {norm == "none"}


def activations_in_order(network: nn.Module) -> list[type[nn.Module]]:
    """The activations of an image's way to the pooling, those in KNConvs among them.

    On the meta device a KNConv would take ten times as long.
    """
    seen: list[type[nn.Module]] = []
    for module in network.modules():
        if isinstance(module, ACTIVATIONS):
            module.register_forward_hook(lambda layer, *_: seen.append(type(layer)))
        elif isinstance(module, KNConv2d) and module.activation == "relu":
            module.register_forward_hook(lambda *_: seen.append(nn.ReLU))
    with torch.no_grad():
        network.eval().features(torch.zeros(1, 3, 32, 32))
        network.head(torch.zeros(1, 3, 2, 2))
    return seen


@pytest.mark.parametrize("name", NETWORKS)
def test_each_activation_is_in_its_place(name: str):
    expected = activations_in_order(create_model(name, norm="batch"))
    for rules in ({}, {"head": False}, {"head": True}):
        assert activations_in_order(create_model(name, rules=rules)) == expected


def test_squeeze_excite_scales_channels_by_their_means():
    gate = SqueezeExcite(6, 2, nn.ReLU, nn.Sigmoid)
    x = torch.randn(3, 6, 4, 5)
    hidden = (x.mean((2, 3)) @ gate.fc1.weight[..., 0, 0].T + gate.fc1.bias).relu()
    factors = (hidden @ gate.fc2.weight[..., 0, 0].T + gate.fc2.bias).sigmoid()
    torch.testing.assert_close(gate(x), x * factors[..., None, None])


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_initial_weights_of_a_group_are_those_of_a_convolution_of_its_own(mode: str):
    grouped, single = nn.Conv2d(512, 1024, 3, groups=512), nn.Conv2d(1, 2, 3)
    init_convolutions(grouped, mode, fan_of_group=True)
    fan = single.weight[0].numel() if mode == "fan_in" else single.weight[:, 0].numel()
    assert grouped.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_depthwise_knconvs_start_with_outputs_of_the_scale_of_normalised_windows(name: str):
    """With PyTorch's ``fan_out`` their deviation is 0.04 to 0.22, and updates drown them."""
    network = create_model(name)
    scales: list[float] = []
    for conv, *_ in triples(network).values():
        if conv.groups > 1:
            conv.register_forward_hook(lambda *args: scales.append(args[-1].std().item()))
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    assert min(scales) > 0.25
    assert max(scales) < 4


@pytest.mark.parametrize("name", NETWORKS)
def test_rules_that_do_nothing_are_refused(name: str):
    with pytest.raises(ValueError, match="rule residual_relu='sum' does nothing"):
        create_model(name, rules={"residual_relu": "sum"})


def test_gates_are_a_quarter_in_multiples_of_8():
    gates = [m for m in on_meta("mobilenet_v3_small").modules() if isinstance(m, SqueezeExcite)]
    sizes = {m.fc1.in_channels: m.fc1.out_channels for m in gates}
    assert sizes == {16: 8, 96: 24, 240: 64, 120: 32, 144: 40, 288: 72, 576: 144}
    assert all(a < b for a, b in pairwise(sorted(sizes.values())))


@pytest.mark.parametrize(("norm", "channels"), [("kernel", 1), ("batch", 96)])
def test_depthwise_weights_start_larger_with_the_kernel_norm(norm: str, channels: int):
    conv = triples(create_model("efficientnet_b0", norm=norm))["2.0.block.1"][0]
    assert conv.weight.shape == (96, 1, 3, 3)
    expected = (2 / 9 / channels) ** 0.5
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.15)
