"""How the rivals stand in networks: their convolutions, activations and residual blocks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kernelnorm.models import create_model, list_models
from kernelnorm.models.initialisation import init_convolutions
from kernelnorm.models.resnet import BasicBlock, Bottleneck
from kernelnorm.norms import (
    NORMS,
    EvoNorm2dS0,
    FilterResponseNorm2d,
    Scale,
    ScaledReLU,
    ScaledWSConv2d,
    WSConv2d,
    describe,
    weight_norm_conv,
)
from tests.networks import small_densenet

ELSEWHERE = {"batch", "group", "layer", "instance", "positional", "local_context", "none", "kernel"}
"""The norms of the paper, whose networks have tests of their own."""

NEW = [norm for norm in NORMS if norm not in ELSEWHERE]
OWN_ACTIVATION = {"evonorm_s0": EvoNorm2dS0, "frn": FilterResponseNorm2d, "nf": ScaledReLU}


def small(norm: str, name: str = "vgg8", **options: object) -> nn.Module:
    size = {"width": 0.25} if name == "vgg8" else {"small_images": True}
    return create_model(name, norm=norm, num_classes=5, **{**size, **options})


def pairs(names: Iterable[str], norms: Iterable[str]) -> list[tuple[str, str]]:
    """The networks with each norm, as far as there are such; at least one for each norm."""
    made = [(name, norm) for norm in norms for name in names if name in list_models(norm)]
    assert {norm for _, norm in made} == {*norms}
    return made


@cache
def on_meta(name: str, norm: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, norm=norm)


@pytest.mark.parametrize("norm", [n for n in NORMS if n != "kernel"])
def test_training_steps_make_the_loss_fall(norm: str) -> None:
    torch.manual_seed(0)
    images, classes = torch.randn(10, 3, 16, 16), torch.arange(10) % 5
    network = small(norm, width=0.125)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(16):
        loss = nn.functional.cross_entropy(network(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("norm", [norm for norm in NEW if describe(norm).batch_one])
def test_one_image_trains_a_network(norm: str) -> None:
    network = small(norm)
    network(torch.randn(1, 3, 16, 16)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(("name", "norm"), pairs(["vgg8", "resnet18", "densenet121"], NEW))
def test_convolutions_are_the_norms_own(name: str, norm: str) -> None:
    network = small_densenet(norm) if name == "densenet121" else on_meta(name, norm)
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    if norm == "weight_norm":
        assert all(parametrize.is_parametrized(conv, "weight") for conv in convs)
    else:
        own = {"ws_group": WSConv2d, "batch_channel": WSConv2d, "nf": ScaledWSConv2d}
        assert {type(conv) for conv in convs} == {own.get(norm, nn.Conv2d)}
    assert {conv.bias is not None for conv in convs} == {describe(norm).bias}


@pytest.mark.parametrize(
    ("name", "norm"), pairs(["vgg8", "resnet18", "resnet50", "densenet121"], OWN_ACTIVATION)
)
def test_an_own_activation_replaces_every_relu(name: str, norm: str) -> None:
    network = create_model(name, norm=norm).eval()
    assert not [m for m in network.modules() if isinstance(m, nn.ReLU)]
    order: list[type] = []
    for m in network.modules():
        if isinstance(m, (nn.Conv2d, OWN_ACTIVATION[norm])):
            m.register_forward_hook(lambda m, *_: order.append(type(m)))
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    conv = ScaledWSConv2d if norm == "nf" else nn.Conv2d
    # One stands before or after each convolution, and two between DenseNet's stem and first block.
    # A shortcut's convolution shares the block's first.
    blocks = [m for m in network.modules() if isinstance(m, (BasicBlock, Bottleneck))]
    shortcuts = sum(not isinstance(block.downsample, nn.Identity) for block in blocks)
    expected = order.count(conv) - shortcuts + (name == "densenet121")
    assert order.count(OWN_ACTIVATION[norm]) == expected
    assert order[0] == conv
    assert order[-1] == OWN_ACTIVATION[norm]


@pytest.mark.parametrize("norm", ["evonorm_s0", "frn"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_pre_activated_blocks(name: str, norm: str) -> None:
    """Beside a direct wiring of the same layers."""
    network, x = small(norm, name), torch.randn(2, 3, 16, 16)

    def block(m: nn.Module, x: Tensor) -> Tensor:
        a = m.preact(x)
        y = m.conv2(m.bn1(m.conv1(a)))
        y = m.conv3(m.bn2(y)) if hasattr(m, "conv3") else y
        return y + (m.downsample[0](a) if isinstance(m.downsample, nn.Sequential) else x)

    expected = network.conv1(x)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for m in stage:
            expected = block(m, expected)
    expected = network.fc(network.postact(expected).mean((2, 3)))
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_normalizer_free_blocks_are_h_plus_alpha_f_of_h_by_beta(name: str) -> None:
    network = small("nf", name)
    variance = 1.0
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            projects = not isinstance(block.downsample, nn.Identity)
            h = torch.randn(2, block.conv1.in_channels, 4, 4)
            seen: list[Tensor] = []
            hook = block.conv1.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
            y = block(h)
            hook.remove()
            a = h.relu() * (2 / (1 - 1 / torch.pi)) ** 0.5 / variance**0.5
            torch.testing.assert_close(seen[0], a)
            f = block.conv2(block.bn1(block.conv1(a)))
            f = block.conv3(block.bn2(f)) if name == "resnet50" else f
            torch.testing.assert_close(y, (block.downsample(a) if projects else h) + 0.2 * f)
            variance = (1.0 if projects else variance) + 0.2**2


def test_the_variance_of_a_normalizer_free_network_is_as_expected() -> None:
    torch.manual_seed(0)
    network = small("nf", "resnet34", small_images=True)
    branches: list[float] = []
    for block in network.modules():
        if isinstance(block, BasicBlock):
            block.conv2.register_forward_hook(lambda *args: branches.append(args[2].var().item()))
    with torch.no_grad():
        network(torch.randn(4, 3, 32, 32))
    assert len(branches) == 16
    assert min(branches) > 0.4
    assert max(branches) < 2.5


def test_there_are_factors_in_normalizer_free_networks_only() -> None:
    for norm in ("batch", "evonorm_s0", "kernel", "nf"):
        scales = [m for m in on_meta("resnet18", norm).modules() if isinstance(m, Scale)]
        assert bool(scales) == (norm == "nf")


def test_normalizer_free_networks_that_nobody_published_are_refused() -> None:
    assert list_models("nf") == ["vgg8", "resnet18", "resnet34", "resnet50", "resnet101"]
    for name in {*list_models("batch")} - {*list_models("nf")}:
        family = name[:8]
        with pytest.raises(ValueError, match=f"'nf' exists for vgg and resnet .* not for {family}"):
            create_model(name, norm="nf")


@pytest.mark.parametrize("name", ["vgg8", "resnet18", "densenet121"])
def test_weight_norm_starts_as_the_network_without_norms(name: str) -> None:
    networks = []
    for norm in ("none", "weight_norm"):
        torch.manual_seed(0)
        networks.append(small(norm, name).eval())
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(networks[0](x), networks[1](x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_initial_weights_with_weight_norm_are_those_of_a_convolution(mode: str) -> None:
    convs = []
    for made_by in (nn.Conv2d, weight_norm_conv):
        torch.manual_seed(0)
        conv = made_by(8, 8, 3, groups=4)
        init_convolutions(conv, mode, fan_of_group=True)
        convs.append(conv)
    torch.testing.assert_close(convs[0].weight, convs[1].weight)
    assert not convs[1].bias.any()


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
@pytest.mark.parametrize("norm", ["evonorm_s0", "frn"])
def test_own_activations_among_others(name: str, norm: str) -> None:
    """They replace an activation where there is one; linear bottlenecks stay linear."""
    batch, other = on_meta(name, "batch"), on_meta(name, norm)
    linear = 0
    for key, module in batch.features.named_modules():
        if isinstance(module, nn.Sequential) and isinstance(module[0], nn.Conv2d):
            conv_norm = other.features.get_submodule(key)
            assert [type(m) for m in conv_norm] == [nn.Conv2d, OWN_ACTIVATION[norm]]
            own = conv_norm[1].v if norm == "evonorm_s0" else conv_norm[1].tau
            assert (own is not None) == (len(module) == 3)
            linear += own is None
    assert linear == {"mobilenet_v3_small": 11, "efficientnet_b0": 16}[name]
