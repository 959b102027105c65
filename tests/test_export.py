"""The layers in torch.fx, torch.jit, torch.export, ONNX and packages without Python."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kernelnorm as kn
from kernelnorm.models import create_model
from tests.networks import (
    assert_all_close,
    conv_and_norm,
    images,
    layers_and_a_block,
    operators_of,
    small_densenet,
)

AUTO = torch.export.Dim.AUTO


@pytest.fixture
def x() -> Tensor:
    return images()


# torch.fx


def small_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "layers":
        return nn.Sequential(
            kn.KNConv2d(3, 8, 3, padding=1, activation="relu"), kn.KernelNorm2d(1), nn.Flatten()
        )
    if name == "densenet":
        return small_densenet()
    if name == "vgg8":
        return create_model(name, num_classes=4, width=0.25)
    return create_model(name, num_classes=4, small_images=True)


@pytest.mark.parametrize("name", ["layers", "vgg8", "resnet18", "densenet"])
def test_fx_has_layers_as_leaves(name: str):
    network = small_network(name).eval()
    graph = torch.fx.symbolic_trace(network)
    called = {n.target for n in graph.graph.nodes if n.op == "call_module"}
    layers = {
        n for n, m in network.named_modules() if isinstance(m, (kn.KNConv2d, kn.KernelNorm2d))
    }
    assert layers <= called
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(graph(x), network(x))
    torch.manual_seed(0)
    y = graph.train()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, network.train()(x))


def test_fx_of_all_dimensions():
    for conv, norm, d in (
        (kn.KNConv1d, kn.KernelNorm1d, 1), (kn.KNConv2d, kn.KernelNorm2d, 2),
        (kn.KNConv3d, kn.KernelNorm3d, 3),
    ):  # fmt: skip
        network = nn.Sequential(conv(3, 4, 3), norm(2)).eval()
        x = torch.randn(2, 3, *[6] * d)
        torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))


def test_fx_of_a_layer_by_itself():
    """The root of a trace is no leaf: there the call of the function is one."""
    layer, x = kn.KNConv2d(3, 4, 3).eval(), torch.randn(2, 3, 6, 6)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * 2) + self.layer(x)

    network = Around().eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))


# torch.jit


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("requires_grad", [True, False])
def test_jit_trace_save_and_load(x: Tensor, requires_grad: bool):
    layers = [
        kn.KNConv2d(4, 8, 3, stride=2, padding=1, groups=2, activation="relu"),
        kn.KernelNorm2d(1), kn.KNConv2d(8, 6, 3, padding="same", padding_mode="reflect"),
    ]  # fmt: skip
    network = nn.Sequential(*layers).eval().requires_grad_(requires_grad)
    network(x)  # used before
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(network, x)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for other in (x, torch.randn_like(x) * 3 + 1, torch.randn(5, 4, 9, 8)):
        torch.testing.assert_close(loaded(other), network(other), rtol=1e-4, atol=1e-4)
    if requires_grad:
        loaded(x).square().sum().backward()
        network(x).square().sum().backward()
        assert_all_close(
            [p.grad for p in loaded.parameters()], [p.grad for p in network.parameters()], 1e-3
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", ["vgg8", pytest.param("resnet18", marks=pytest.mark.slow), "densenet"]
)
def test_jit_trace_of_networks(name: str):
    network, x = small_network(name).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(network, x)
        other = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(traced(other), network(other), rtol=1e-3, atol=1e-3)


# torch.export and ONNX


@pytest.mark.parametrize(
    ("strict", "training"),
    [
        (True, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
def test_export_with_a_dynamic_batch(x: Tensor, strict: bool, training: bool):
    """What is exported runs without this library."""
    module, x = conv_and_norm().double().train(training), x.double()
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(module, (x,), strict=strict, dynamic_shapes=({0: batch},))
    assert operators_of(program.graph_module) == set()
    for inputs in (x, torch.randn(5, 4, 9, 8, dtype=torch.float64)):
        torch.manual_seed(1)
        y = program.module()(inputs)
        torch.manual_seed(1)
        torch.testing.assert_close(y, module(inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_export_with_dynamic_sizes(training: bool):
    module = layers_and_a_block().double().train(training)
    x = torch.randn(2, 4, 32, 24, dtype=torch.float64)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: AUTO, 2: AUTO, 3: AUTO},), strict=False
    )
    for size in ((1, 4, 32, 24), (3, 4, 17, 35), (2, 4, 48, 20)):
        inputs = torch.randn(size, dtype=torch.float64)
        torch.manual_seed(1)
        y = program.module()(inputs)
        torch.manual_seed(1)
        torch.testing.assert_close(y, module(inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["resnet18", "densenet"])
def test_export_of_networks_with_dynamic_sizes(name: str):
    network = small_network(name).eval()
    program = torch.export.export(
        network, (torch.randn(2, 3, 64, 48),), dynamic_shapes=({0: AUTO, 2: AUTO, 3: AUTO},),
        strict=False,
    )  # fmt: skip
    for size in ((1, 3, 64, 48), (3, 3, 33, 71), (2, 3, 96, 40)):
        x = torch.randn(size)
        torch.testing.assert_close(program.module()(x), network(x), rtol=1e-3, atol=1e-3)


def layers_of_every_padding() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        kn.KNConv2d(3, 8, 3, stride=2, padding=1, activation="relu"),
        kn.KernelNorm2d(3, stride=2, padding=1),
        kn.KNConv2d(8, 6, 4, padding="same", padding_mode="reflect"),
        kn.KernelNorm2d(1),
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_with_dynamic_sizes(tmp_path: Path, dynamo: bool):
    onnxruntime = pytest.importorskip("onnxruntime")
    network, x, file = layers_of_every_padding(), torch.randn(2, 3, 32, 48), tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        if dynamo:
            dynamic = torch.export.Dim.DYNAMIC
            torch.onnx.export(
                network, (x,), str(file), dynamo=True, verbose=False,
                dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
            )  # fmt: skip
        else:
            torch.onnx.export(
                network, (x,), str(file), dynamo=False, input_names=["x"],
                dynamic_axes={"x": {0: "n", 2: "h", 3: "w"}},
            )  # fmt: skip
    session = onnxruntime.InferenceSession(str(file))
    for size in ((2, 3, 32, 48), (1, 3, 41, 57)):
        x = torch.randn(size)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), network(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Inductor's own parts
def test_a_package_without_python():
    network, x = layers_of_every_padding(), torch.randn(4, 3, 32, 32)
    batch = torch.export.Dim("n", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
        loaded = torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(program)
        )
        for inputs in (x, x[:1], torch.randn(7, 3, 32, 32)):
            torch.testing.assert_close(loaded(inputs), network(inputs), rtol=1e-3, atol=1e-3)
