"""KNResNets: their description as one function, and the files that the authors publish."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelnorm.models import create_model, knresnet, list_models, load_published, resnet18
from kernelnorm.modules import KernelNorm2d, KNConv2d

NAMES = ["knresnet18", "knresnet34", "knresnet50"]
PARAMETERS: dict[str, tuple[int, ...]] = {  # without and with the stem for small images
    "knresnet13": (2_041_034,),
    "knresnet18": (11_685_220, 11_677_540),
    "knresnet34": (21_792_830, 21_785_150),
    "knresnet50": (25_556_390, 25_525_670),
}
STAGES = {  # blocks, channels, channels inside
    "knresnet18": [(2, 64, 256), (2, 256, 256), (1, 512, 512), (1, 724, 724)],
    "knresnet34": [(4, 64, 256), (5, 256, 320), (3, 512, 640), (2, 512, 843)],
    "knresnet50": [(4, 256, 64), (5, 512, 128), (4, 810, 201), (2, 2048, 512)],
}
LEAST = {"knresnet18": (93, 16), "knresnet34": (93, 16), "knresnet50": (29, 8)}
CLASSES = 5

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def published_shapes(name: str, small: bool) -> Shapes:
    """The tensors of a published file."""

    def conv(key: str, before: int, after: int, size: int) -> Shapes:
        key += ".conv1x1" * (size == 1)
        yield f"{key}.weight", (after, before, size, size)
        yield f"{key}.bias", (after,)

    stages, bottlenecks = STAGES[name], name == "knresnet50"
    channels = stages[0][1]
    yield from conv("block0.0", 3, channels, 3 if small else 7)
    block = 0
    for number, (depth, width, inner) in enumerate(stages):
        size = 1 if bottlenecks and number == 3 else 2
        if number:
            yield from conv(f"trans_block{number}.conv", channels, width, size)
        channels = width
        for _ in range(depth):
            block += 1
            key = f"res_block{block}.conv"
            yield from conv(f"{key}1", channels, inner, size)
            if bottlenecks:
                yield from conv(f"{key}2", inner, inner, 3)
            yield from conv(f"{key}{3 if bottlenecks else 2}", inner, channels, size)
    if not bottlenecks:
        yield from conv("conv_block_f.conv", channels, 512, 2)
        channels = 512
    yield "fc.weight", (CLASSES, channels)
    yield "fc.bias", (CLASSES,)


def published_tensors(name: str, small: bool) -> dict[str, Tensor]:
    """Random weights of a size that keeps the signal's, and biases that are not 0."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for key, shape in published_shapes(name, small):
        scale = 0.1 if len(shape) == 1 else (2 / torch.Size(shape[1:]).numel()) ** 0.5
        tensors[key] = torch.randn(shape, generator=generator) * scale
    return tensors


def save(file: Path, model: Any, **beside: Any) -> Path:
    options = argparse.Namespace(lr=0.1, epochs=100, arch="knresnet", gpus=[0, 1])
    torch.save({"epoch": 100, "model": model, "args": options, **beside}, file)
    return file


def normalized_windows(x: Tensor, size: int, stride: int, p: float) -> Tensor:
    """Each window less its mean, over the deviation that dropout is expected to give it."""
    windows = F.unfold(x, size, stride=stride)
    mean = windows.mean(1, keepdim=True)
    variance = (windows - mean).square().mean(1, keepdim=True)
    n = windows.shape[1]
    variance = variance + p / (1 - p) * (1 - 1 / n) * windows.square().mean(1, keepdim=True)
    return (windows - mean) / (variance + 1e-5).sqrt()


def knconv(x: Tensor, weight: Tensor, bias: Tensor, p: float, stride: int = 1) -> Tensor:
    """The product of the normalised windows and the filters."""
    size = weight.shape[-1]
    y = weight.flatten(1) @ normalized_windows(x, size, stride, p) + bias[:, None]
    height, width = ((pixels - size) // stride + 1 for pixels in x.shape[-2:])
    return y.view(len(x), -1, height, width)


def described(name: str, small: bool, p: float, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network, as it is described, with the tensors of a published file."""

    def conv(x: Tensor, key: str, pad: Any = (0, 0, 0, 0), stride: int = 1) -> Tensor:
        key = key if f"{key}.weight" in tensors else f"{key}.conv1x1"
        return knconv(F.pad(x, pad), tensors[f"{key}.weight"], tensors[f"{key}.bias"], p, stride)

    bottlenecks = name == "knresnet50"
    if small:
        x = conv(x, "block0.0", (1, 1, 1, 1))
    else:
        x = F.max_pool2d(conv(x, "block0.0", (3, 3, 3, 3), stride=2), 3, 2, 1)
    paddings = [(1, 0, 1, 0), (0, 1, 0, 1), (1, 0, 1, 0) if small else (2, 1, 2, 1)]
    block = 0
    for number, (depth, _, _) in enumerate(STAGES[name]):
        pointwise = bottlenecks and number == 3
        if number:
            pad = (0, 0, 0, 0) if pointwise else paddings[number - 1]
            x = F.max_pool2d(conv(F.relu(x), f"trans_block{number}.conv", pad), 2)
        for _ in range(depth):
            block += 1
            key = f"res_block{block}.conv"
            y = conv(F.relu(x), f"{key}1", (0, 0, 0, 0) if pointwise else (1, 1, 1, 1))
            if bottlenecks:
                y = conv(F.relu(y), f"{key}2", (1, 1, 1, 1))
            x = conv(F.relu(y), f"{key}{3 if bottlenecks else 2}") + x
    if not bottlenecks:
        pad = (1, 1, 1, 1) if small else (0, 0, 0, 0)
        x = conv(F.relu(F.max_pool2d(x, 2)), "conv_block_f.conv", pad)
    x = F.relu(normalized_windows(x, 1, 1, min(5 * p, 0.25)))
    return x.mean(2) @ tensors["fc.weight"].T + tensors["fc.bias"]


def on_meta(name: str, **options: Any) -> nn.Module:
    """The network without memory for its parameters: enough for names and shapes."""
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.mark.parametrize("name", PARAMETERS)
def test_numbers_of_parameters_are_those_in_the_docstring(name: str) -> None:
    documented = str(getattr(knresnet, name).__doc__)
    for options, count in zip(({}, {"small_images": True}), PARAMETERS[name], strict=False):
        assert sum(p.numel() for p in on_meta(name, **options).parameters()) == count
        assert f"{count:,}" in documented


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, small), marks=[] if quick else pytest.mark.slow)
        for name, small, quick in (
            ("knresnet18", True, True),
            ("knresnet18", False, True),
            ("knresnet34", True, False),
            ("knresnet34", False, False),
            ("knresnet50", True, True),
            ("knresnet50", False, False),
        )
    ],
    ids=lambda param: f"{param[0]}{'-small' * param[1]}",
)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, bool, dict[str, Tensor], nn.Module]:
    """The tensors of a file, and the network that is loaded from it, in float64."""
    name, small = request.param
    tensors = published_tensors(name, small)
    file = save(tmp_path_factory.mktemp("published") / "network.pt", tensors)
    network = load_published(name, file).double()
    file.unlink()
    return name, small, {key: tensor.double() for key, tensor in tensors.items()}, network


@pytest.mark.parametrize(("p", "training"), [(0, True), (1 / 64, False), (0.25, False)])
def test_networks_with_published_weights_are_those_described(
    published: tuple[str, bool, dict[str, Tensor], nn.Module], p: float, training: bool
) -> None:
    """The rates are multiples of 1/65536, the steps of dropout, so that they are exact."""
    name, small, tensors, loaded = published
    network = on_meta(name, num_classes=CLASSES, small_images=small, dropout_p=p)
    network.load_state_dict(loaded.state_dict(), assign=True)
    least = LEAST[name][small]
    x = torch.randn(2, 3, least, least + 5, dtype=torch.float64)
    with torch.no_grad():
        scores = network.train(training)(x)
    torch.testing.assert_close(scores, described(name, small, p, tensors, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "small"), [(name, small) for name in NAMES for small in (0, 1)])
def test_smaller_images_than_the_docstring_says_are_refused(name: str, small: int) -> None:
    least = LEAST[name][small]
    documented = getattr(knresnet, "knresnet18" if name == "knresnet34" else name).__doc__
    stated = re.search(r"at least (\d+), or (\d+) with\s+``small_images``", documented)
    assert stated is not None
    assert int(stated[1 + small]) == least
    network = create_model(name, small_images=bool(small))
    with torch.no_grad():
        assert network(torch.zeros(2, 3, least, least)).shape == (2, 1000)
        with pytest.raises((RuntimeError, ValueError)):
            network(torch.zeros(2, 3, least - 1, least))


@pytest.mark.parametrize("name", PARAMETERS)
def test_dropout_and_evaluation_of_all_kernel_layers(name: str) -> None:
    for p, head_p in ((0.05, 0.25), (0.02, 0.1), (0.125, 0.25)):
        options = {"head_dropout_p": head_p} if name == "knresnet13" else {}
        network = on_meta(name, dropout_p=p, evaluation="plain", **options)
        layers = [m for m in network.modules() if isinstance(m, (KNConv2d, KernelNorm2d))]
        assert {layer.evaluation for layer in layers} == {"plain"}
        (head,) = (layer for layer in layers if isinstance(layer, KernelNorm2d))
        assert head.dropout_p == pytest.approx(head_p)
        assert {layer.dropout_p for layer in layers if layer is not head} == {p}


def test_the_dropout_that_is_not_given() -> None:
    for name in PARAMETERS:
        network, (p, head_p) = on_meta(name), (0.1, 0.5) if name == "knresnet13" else (0.05, 0.25)
        assert network.head[0].dropout_p == head_p
        assert {m.dropout_p for m in network.modules() if isinstance(m, KNConv2d)} == {p}


def test_initial_weights_have_the_deviation_of_he_and_biases_are_0() -> None:
    network = create_model("knresnet18", num_classes=10)
    for conv in (m for m in network.modules() if isinstance(m, KNConv2d)):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert conv.bias is not None
        assert not conv.bias.any()


def test_knresnet13_is_twelve_convolutions_and_a_linear_layer() -> None:
    network = create_model("knresnet13").eval()
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64] * 6 + [128] * 3 + [256] * 3
    assert {(conv.kernel_size, conv.padding) for conv in convs} == {((3, 3), (1, 1))}
    sizes: list[int] = []
    for conv in convs:
        conv.register_forward_hook(lambda _, x, y: sizes.append(y.shape[-1]))
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    assert sizes == [32] * 4 + [16] * 3 + [8] * 3 + [4] * 2


def test_knresnet13_is_what_its_docstring_says() -> None:
    network = create_model("knresnet13", dropout_p=0.25, head_dropout_p=0.5).double().eval()
    tensors = [*network.parameters()]
    filters = iter([*zip(tensors[::2], tensors[1::2], strict=True)])

    def conv(x: Tensor) -> Tensor:
        return knconv(F.pad(x, (1, 1, 1, 1)), *next(filters), 0.25)

    images = torch.randn(2, 3, 34, 16, dtype=torch.float64)
    with torch.no_grad():
        scores = network(images)
        x = conv(images)
        x = x + conv(F.mish(conv(F.mish(x))))
        for _ in range(3):
            x = F.max_pool2d(conv(F.mish(x)), 2)
            x = x + conv(F.mish(conv(F.mish(x))))
        x = F.mish(normalized_windows(x, 1, 1, 0.5))
        weight, bias = next(filters)
        x = F.adaptive_avg_pool2d(x.reshape(2, 256, 4, 2), 2).flatten(1)
        torch.testing.assert_close(scores, x @ weight.T + bias, rtol=1e-5, atol=1e-5)
    assert not [*filters]


@pytest.mark.parametrize("name", ["knresnet13", "knresnet18"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    small = {} if name == "knresnet13" else {"small_images": True}
    network = create_model(name, num_classes=5, **small)
    network = network.to(memory_format=torch.channels_last)
    network(torch.randn(2, 3, 16, 16)).logsumexp(dim=1).sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", PARAMETERS)
def test_they_exist_with_the_kernel_norm_only(name: str) -> None:
    assert name in list_models()
    assert name not in list_models("batch")
    with pytest.raises(ValueError, match=r"unknown norm 'bacth', choose one of: batch, group"):
        list_models("bacth")
    message = f"^{name} exists with norm='kernel' only, got norm='batch'. Networks with that norm: "
    with pytest.raises(ValueError, match=message):
        create_model(name, norm="batch")
    with pytest.raises(ValueError, match=r"unknown norm 'bacth', choose one of: batch, group"):
        create_model(name, norm="bacth")
    with pytest.raises(ValueError, match=f"got rules={{'head': False}} for {name}. Give it dropo"):
        create_model(name, rules={"head": False})
    with pytest.raises(ValueError, match=r"^dropout_p must be at least 0 and below 1, got 1"):
        create_model(name, dropout_p=1)


class Runs:
    """Calls a function when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": {"fc.bias": torch.zeros(5)}, "args": argparse.Namespace(x=Runs())}
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=zipped)
    message = rf"evil.pt was not read, as it holds {os.mkdir.__module__}.mkdir, which is not safe"
    with pytest.raises(ValueError, match=message):
        load_published("knresnet18", "evil.pt")
    assert not Path("unpickled").exists()


def test_only_a_namespace_may_be_beside_the_tensors(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pt", {"fc.bias": torch.zeros(5)}, folder=Path("x"))
    with pytest.raises(ValueError, match=r"a.pt was not read, as it holds pathlib.*Path, which is"):
        load_published("knresnet18", file)


def test_a_namespace_stays_refused_elsewhere(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pt", {})
    with pytest.raises(ValueError, match="holds no state dict"):
        load_published("knresnet18", file)
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text", "is not a file of PyTorch, or damaged"),
        (b"", "is not a file of PyTorch, or damaged"),
        ({"fc.bias": torch.zeros(5)}, "holds no state dict under 'model', as the published files"),
        ([1, 2], "holds no state dict under 'model', as the published files do"),
        ({"model": {"fc.bias": [1, 2]}}, "'model' must hold tensors by name, as the published"),
        (
            {"model": {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(5, 2)}},
            "is not of a KNResNet: it must have block0.0.weight of 4 dimensions and fc.weight of 2;"
            " it has conv1.weight, fc.weight",
        ),
    ],
    ids=str,
)
def test_files_of_other_things(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=re.escape(f"{file}{': ' * ('must hold' in message)}")):
        load_published("knresnet18", file)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_published("knresnet18", file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for file in (tmp_path / "a.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"there is no file {file}: give a file that"):
            load_published("knresnet18", file)


def test_a_file_of_another_network_says_what_does_not_fit(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = dict(published_shapes("knresnet18", small=False))
    tensors = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    del tensors["res_block6.conv2.bias"]
    tensors["extra"] = torch.zeros(1)
    file = save(tmp_path / "a.pt", tensors)
    with pytest.raises(
        ValueError,
        match=r"does not fit knresnet18: res_block6.conv2.bias is missing; extra is unknown. Is it",
    ):
        load_published("knresnet18", file)
    message = (
        r"does not fit knresnet34: res_block3.conv1.weight has shape \(256, 256, 2, 2\), not "
        r"\(256, 64, 2, 2\); .*; .*; and \d+ more. Is it of another network\?"
    )
    with pytest.raises(ValueError, match=message):
        load_published("knresnet34", file)
    message = r"does not fit the network: fc.weight has shape \(5, 512\), not \(9, 512\); fc.bias"
    with pytest.raises(ValueError, match=message):
        load_published(create_model("knresnet18", num_classes=9), file)


def test_networks_without_published_weights(tmp_path: Path) -> None:
    message = "^no weights are published for 'knresnet13', only for knresnet18, knresnet34, knres"
    with pytest.raises(ValueError, match=message):
        load_published("knresnet13", tmp_path)
    with pytest.raises(ValueError, match=r"^no weights are published for a ResNet, only for knres"):
        load_published(resnet18(), tmp_path)
