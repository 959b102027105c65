import math
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import nn

import kernelnorm as kn
from kernelnorm.models import create_model, list_models, vgg8
from kernelnorm.modules import KernelNorm2d, KNConv2d
from kernelnorm.norms import NORMS

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "densenet121": (6, 12, 24, 16),
    "densenet161": (6, 12, 36, 24),
    "densenet169": (6, 12, 32, 32),
    "densenet201": (6, 12, 48, 32),
}
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
}
WITH_ANY_NORM = list_models("batch")
DEPTHWISE = ("efficientnet_b0", "mobilenet_v3_small")  # their rules: test_depthwise.py
PAPERS = [name for name in WITH_ANY_NORM if name not in DEPTHWISE]
WITH_HEAD = [name for name in PAPERS if name != "vgg8"]
QUICK = ["vgg8", "resnet18", "resnet50", "densenet121"]  # one of each wiring


def slow_unless(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    """The names as parameters of a test."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@cache
def on_meta(name: str, **options: object) -> nn.Module:
    """The network without memory for its parameters: enough for names and shapes."""
    with torch.device("meta"):
        return create_model(name, **options)


def kernel_norms(network: nn.Module) -> list[KernelNorm2d]:
    """The KernelNorm layers of a network."""
    return [m for m in network.modules() if isinstance(m, KernelNorm2d)]


Tensors = Iterator[tuple[str, tuple[int, ...]]]


def conv(name: str, out_channels: int, in_channels: int, size: int) -> Tensors:
    yield f"{name}.weight", (out_channels, in_channels, size, size)


def batch_norm(name: str, channels: int) -> Tensors:
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{tensor}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def linear(name: str, channels: int) -> Tensors:
    yield f"{name}.weight", (1000, channels)
    yield f"{name}.bias", (1000,)


def torchvision_resnet(name: str) -> Tensors:
    """The tensors of torchvision's state dict, in order."""
    bottleneck = name in ("resnet50", "resnet101")
    yield from conv("conv1", 64, 3, 7)
    yield from batch_norm("bn1", 64)
    channels = 64
    for layer, (depth, width) in enumerate(zip(DEPTHS[name], (64, 128, 256, 512), strict=True), 1):
        convs = [(width, 1), (width, 3), (4 * width, 1)] if bottleneck else [(width, 3)] * 2
        for block in range(depth):
            prefix, before = f"layer{layer}.{block}", channels
            for index, (out_channels, size) in enumerate(convs, 1):
                yield from conv(f"{prefix}.conv{index}", out_channels, channels, size)
                yield from batch_norm(f"{prefix}.bn{index}", out_channels)
                channels = out_channels
            if before != channels:
                yield from conv(f"{prefix}.downsample.0", channels, before, 1)
                yield from batch_norm(f"{prefix}.downsample.1", channels)
    yield from linear("fc", channels)


def torchvision_densenet(name: str) -> Tensors:
    """The tensors of torchvision's state dict, in order."""
    channels, growth = (96, 48) if name == "densenet161" else (64, 32)
    yield from conv("features.conv0", channels, 3, 7)
    yield from batch_norm("features.norm0", channels)
    for block, depth in enumerate(DEPTHS[name], 1):
        for layer in range(1, depth + 1):
            prefix = f"features.denseblock{block}.denselayer{layer}"
            yield from batch_norm(f"{prefix}.norm1", channels)
            yield from conv(f"{prefix}.conv1", 4 * growth, channels, 1)
            yield from batch_norm(f"{prefix}.norm2", 4 * growth)
            yield from conv(f"{prefix}.conv2", growth, 4 * growth, 3)
            channels += growth
        if block < 4:
            yield from batch_norm(f"features.transition{block}.norm", channels)
            yield from conv(f"features.transition{block}.conv", channels // 2, channels, 1)
            channels //= 2
    yield from batch_norm("features.norm5", channels)
    yield from linear("classifier", channels)


@pytest.mark.parametrize("name", DEPTHS)
def test_batch_networks_have_torchvisions_names_shapes_and_number_of_parameters(name):
    expected = torchvision_resnet if name.startswith("resnet") else torchvision_densenet
    network = on_meta(name, norm="batch")
    shapes = [(key, tuple(value.shape)) for key, value in network.state_dict().items()]
    assert shapes == list(expected(name))
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


def test_vgg8_is_table_3():
    shapes = [tuple(p.shape) for p in vgg8(norm="batch").parameters()]
    channels = [3, 64, 128, 256, 512, 512]
    expected = []
    for before, after in pairwise(channels):
        expected += [(after, before, 3, 3), (after,), (after,)]
    assert shapes == [*expected, (10, 512), (10,)]


def test_width_multiplies_the_channels_of_vgg8():
    convs = [m.out_channels for m in vgg8(width=0.25).modules() if isinstance(m, nn.Conv2d)]
    assert convs == [16, 32, 64, 128, 128]


@pytest.mark.parametrize("norm", slow_unless(["batch", "group", "kernel"], NORMS))
@pytest.mark.parametrize("name", slow_unless(["vgg8", "resnet18", "densenet121"], QUICK))
def test_every_parameter_gets_a_gradient_under_every_norm(name, norm):
    if name not in list_models(norm):
        pytest.skip(f"there is no {name} with norm {norm}")
    network = create_model(name, norm=norm, num_classes=5)
    scores = network(torch.randn(2, 3, 64, 64))
    assert scores.shape == (2, 5)
    scores.logsumexp(dim=1).sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("norm", ["batch", "kernel"])
@pytest.mark.parametrize(
    "name", slow_unless(["vgg8", "resnet18", "densenet121", *DEPTHWISE], WITH_ANY_NORM)
)
def test_every_network_takes_other_images_and_classes(name, norm):
    network = create_model(name, norm=norm, num_classes=7, in_channels=1).eval()
    with torch.no_grad():  # on the meta device KNConvs would take ten times as long
        assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    "name", slow_unless(["resnet18", "densenet121", *DEPTHWISE], [*WITH_HEAD, *DEPTHWISE])
)
def test_the_stem_for_small_images_keeps_the_resolution(name):
    resolutions = []
    network = create_model(name, small_images=True).eval()
    network.avgpool.register_forward_pre_hook(lambda _, x: resolutions.append(x[0].shape[-2:]))
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    assert resolutions == [(4, 4)]


@pytest.mark.parametrize("name", slow_unless(QUICK, PAPERS))
def test_rule_1_each_convolution_is_a_knconv_with_bias_and_dropout(name):
    batch, kernel = on_meta(name, norm="batch"), on_meta(name)
    convs = {key: m for key, m in kernel.named_modules() if isinstance(m, nn.Conv2d)}
    for key, replaced in batch.named_modules():
        if isinstance(replaced, nn.Conv2d):
            knconv = convs.pop(key)
            assert isinstance(knconv, KNConv2d)
            assert knconv.bias is not None
            assert knconv.dropout_p == 0.1
            assert knconv.weight.shape == replaced.weight.shape
            assert (knconv.stride, knconv.padding) == (replaced.stride, replaced.padding)
    assert not convs


@pytest.mark.parametrize("name", slow_unless(QUICK, WITH_ANY_NORM))
def test_rule_2_no_batch_norm_and_no_buffers(name):
    network = on_meta(name)
    norms = [m for m in network.modules() if "Norm" in type(m).__name__]
    assert norms == kernel_norms(network)
    assert not list(network.buffers())


LAST_KNCONV = {
    "vgg8": [],
    "resnet18": ["layer4.1.conv2"],
    "resnet34": ["layer4.2.conv2"],
    "resnet50": ["layer4.2.conv3"],
    "resnet101": ["layer4.2.conv3"],
    "densenet121": ["features.denseblock4.denselayer16.conv2"],
    "densenet161": ["features.denseblock4.denselayer24.conv2"],
    "densenet169": ["features.denseblock4.denselayer32.conv2"],
    "densenet201": ["features.denseblock4.denselayer32.conv2"],
}


@pytest.mark.parametrize(("name", "last"), LAST_KNCONV.items())
def test_rule_3_a_relu_in_each_knconv_but_the_last_before_a_kernel_norm(name, last):
    activations = {
        key: m.activation for key, m in on_meta(name).named_modules() if isinstance(m, KNConv2d)
    }
    assert [key for key, activation in activations.items() if activation is None] == last
    assert set(activations.values()) <= {"relu", None}


@pytest.mark.parametrize("name", slow_unless(["resnet18", "densenet121"], WITH_HEAD))
def test_rule_4_a_kernel_norm_and_a_relu_before_the_average_pooling(name):
    network = create_model(name).eval()
    (norm,) = kernel_norms(network)
    assert (norm.kernel_size, norm.stride, norm.padding) == ((1, 1), (1, 1), (0, 0))
    assert norm.dropout_p == 0.2
    (relu,) = (m for m in network.modules() if isinstance(m, nn.ReLU))
    order = []
    for layer in (norm, relu, network.avgpool):
        layer.register_forward_hook(lambda layer, *_: order.append(layer))
    with torch.no_grad():
        network(torch.zeros(1, 3, 64, 64))
    assert order == [norm, relu, network.avgpool]


def test_vgg8_has_no_kernel_norm():
    assert not kernel_norms(vgg8())


@pytest.mark.parametrize("name", ["vgg8", "resnet18", "densenet121"])
def test_kernel_networks_treat_each_image_alone(name):
    network = create_model(name, num_classes=5).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", slow_unless(QUICK, WITH_HEAD))
def test_convolutions_have_a_bias_only_without_a_norm(name):
    biased = {
        norm: {
            m.bias is not None for m in on_meta(name, norm=norm).modules() if type(m) is nn.Conv2d
        }
        for norm in ("batch", "group", "none")
    }
    assert biased == {"batch": {False}, "group": {False}, "none": {True}}


def test_unknown_models_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown model 'vgg9', choose one of: vgg8, resnet18"):
        create_model("vgg9")


@pytest.mark.parametrize("name", WITH_ANY_NORM)
def test_unknown_norms_are_refused_with_the_choices(name):
    with pytest.raises(ValueError, match="unknown norm 'bacth', choose one of: batch, group"):
        create_model(name, norm="bacth")


def test_a_rule_among_the_options_is_refused_with_its_place():
    with pytest.raises(TypeError, match=r"dropout_p is a rule: pass rules=\{'dropout_p': 0\}"):
        create_model("resnet18", dropout_p=0)


def test_images_without_a_batch_are_refused_by_stochastic_depth():
    """It would draw for each channel."""
    with pytest.raises(ValueError, match=r"expected a batch .* got an input of \(\d+, "):
        create_model("efficientnet_b0", norm="none")(torch.randn(3, 64, 64))


@pytest.mark.parametrize("name", ["vgg8", "resnet18", "densenet121", "mobilenet_v3_small",
                                  "efficientnet_b0", "knresnet13", "knresnet18"])  # fmt: skip
def test_numbers_of_classes_and_channels_are_checked(name: str):
    for option in ("num_classes", "in_channels"):
        with pytest.raises(
            ValueError, match=rf"{option} must be an integer of at least 1 .*got -1"
        ):
            create_model(name, norm="kernel", **{option: -1})


def test_probabilities_are_checked_by_their_names():
    with pytest.raises(ValueError, match="stochastic_depth must be at least 0 and below 1, got 2"):
        create_model("efficientnet_b0", stochastic_depth=2)
    with pytest.raises(ValueError, match=r"head_dropout_p must be at least 0 and below 1, got 1.5"):
        create_model("knresnet13", norm="kernel", head_dropout_p=1.5)


def test_a_width_that_is_not_positive_is_refused():
    for width in (0, math.inf, math.nan):
        with pytest.raises(
            ValueError, match=f"width must be a positive, finite number, got {width}"
        ):
            create_model("vgg8", width=width)


@pytest.mark.parametrize(
    "name",
    [
        "kernelnorm.models.blocks:Rules",
        "kernelnorm.models.knresnet:Residual",
        "kernelnorm.models.mobilenet:InvertedResidual",
    ],
)
def test_networks_that_were_saved_whole_find_their_classes(name: str):
    """Pickles of earlier versions name these classes so, which have moved since."""
    assert isinstance(resolve_name(name), type)


@pytest.mark.parametrize("name", ["KNConv1d", "KNConv2d", "KNConv3d", "KernelNorm2d"])
def test_pickles_name_the_file_of_the_layers(name: str):
    assert getattr(kn, name).__module__ == "kernelnorm.modules"


@pytest.mark.parametrize("norm", ["none", "lrn", "weight_norm", "nf"])
def test_a_vgg8_whose_norm_has_no_shift_tells_images_apart(norm: str) -> None:
    torch.manual_seed(0)
    network = create_model("vgg8", norm=norm)
    assert network(torch.rand(64, 3, 32, 32)).std(0).mean() > 0.01  # 0.0007 with PyTorch's weights
    biases = [m.bias for m in network.features if isinstance(m, nn.Conv2d)]
    assert all(bias is not None and not bias.any() for bias in biases)
