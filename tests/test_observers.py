"""The layers under those who watch a call: compilers, exporters, tracers, dispatch modes."""

from __future__ import annotations

import functools
import io
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import kernelnorm as kn
from kernelnorm.models import create_model
from kernelnorm.models.densenet import DenseNet
from kernelnorm.ops import observers
from kernelnorm.ops.mask import draw_keys, expand_keys, keep
from tests.networks import assert_all_close, conv_and_norm, images, run
from tests.strategies import LAYOUTS, laid_out

CPU = torch.device("cpu")
AUTO = torch.export.Dim.AUTO
KNConv = torch.ops.kernelnorm.kn_conv.default
KNConvBackward = torch.ops.kernelnorm.kn_conv_backward.default


@pytest.fixture
def x() -> Tensor:
    return images()


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def small_densenet() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(8, (2, 2, 1, 1), 16, "kernel", 4, 3, True, None)


def layers_and_a_block() -> nn.Sequential:
    """Layers with a stride, and a dense block."""
    torch.manual_seed(0)
    block = small_densenet().features.denseblock1
    return nn.Sequential(kn.KNConv2d(4, 16, 3, stride=2, padding=1, activation="relu"), block)


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


def operators_of(module: torch.fx.GraphModule) -> set[str]:
    """The names of this library's operators that a graph calls."""
    targets = [
        str(node.target)
        for part in module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
    ]
    return {target.split(".")[1] for target in targets if target.startswith("kernelnorm.")}


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
@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_export_of_networks_with_dynamic_sizes(name: str):
    network = create_model(name, num_classes=4, small_images=True).eval()
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
    network, x = create_model("vgg8", width=0.25, num_classes=4).eval(), torch.randn(4, 3, 32, 32)
    batch = torch.export.Dim("n", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
        loaded = torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(program)
        )
        for inputs in (x, x[:1], torch.randn(7, 3, 32, 32)):
            torch.testing.assert_close(loaded(inputs), network(inputs), rtol=1e-3, atol=1e-3)


# torch.compile


@pytest.mark.parametrize(
    ("training", "memory_format"),
    [(True, torch.channels_last), (False, torch.contiguous_format)],
)
def test_compile_fullgraph_traces_forward_and_backward(x: Tensor, training: bool, memory_format):
    module, x = conv_and_norm().double().train(training), x.double()
    x = x.contiguous(memory_format=memory_format)
    parameters, seen = [*module.parameters()], set()

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.update(operators_of(module))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    expected = run(module, x, parameters)
    assert_all_close(run(compiled, x, parameters), expected, tolerance=1e-9)
    assert seen == {"kn_conv"}  # the backward is added to it afterwards


@pytest.mark.parametrize(
    ("backend", "p", "training"),
    [
        ("aot_eager", 0.1, True),
        ("eager", 0.1, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("eager", 0.1, True), ("eager", 0.0, True), ("aot_eager", 0.0, True),
                ("aot_eager", 0.1, False),
            ]
        ),
    ],
)  # fmt: skip
def test_compile_with_dynamic_sizes(backend: str, p: float, training: bool):
    network = layers_and_a_block().double().train(training)
    for module in network.modules():
        if isinstance(module, kn.KNConv2d):
            module.dropout_p = p
    compiled = torch.compile(network, dynamic=True, backend=backend, fullgraph=True)
    for size in ((2, 4, 32, 40), (3, 4, 49, 33), (5, 4, 20, 20)):
        x = torch.randn(size, dtype=torch.float64)
        results = run(compiled, x, [*network.parameters()])
        expected = run(network, x, [*network.parameters()])
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + b.abs().max().item()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_of_a_schedule_of_dropout():
    """As many graphs as PyTorch allows are not used up by a number that changes."""
    layer, x = kn.KNConv2d(4, 8, 3, activation="relu"), torch.randn(2, 4, 9, 8)
    compiled = torch.compile(layer, backend="eager")
    for step in range(10):  # PyTorch gives up after 8
        layer.dropout_p = 0.3 - 0.01 * step
        torch.manual_seed(step)
        y = compiled(x)
        torch.manual_seed(step)
        torch.testing.assert_close(y, layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own parts
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compile_fullgraph_with_inductor(x: Tensor, memory_format):
    """Generated code, first for one batch size and then for any."""
    layers = [kn.KNConv2d(4, 8, 3, padding=1, activation="relu"), kn.KernelNorm2d(1)]
    module, x = nn.Sequential(*layers).double(), x.double()
    parameters = [*module.parameters()]
    compiled = torch.compile(module, fullgraph=True)
    for batch in (x, x[:2], x):
        batch = batch.contiguous(memory_format=memory_format)
        # It draws its own random numbers: a seed repeats, but is not the one of eager mode.
        first = run(compiled, batch, parameters)
        assert_all_close(run(compiled, batch, parameters), first, tolerance=0)
    module.eval()
    assert_all_close(run(compiled, x, parameters), run(module, x, parameters))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own parts
def test_inductor_makes_the_mask_of_eager_mode():
    compiled = torch.compile(keep, fullgraph=True)
    for shape in ((3, 4, 9, 8), (2, 5, 7)):
        keys = expand_keys(draw_keys(shape, CPU), shape, 0.3)
        assert torch.equal(compiled(keys, torch.float32), keep(keys, torch.float32))


OPERATORS = [  # layout, dtype, masked, relu, bias
    ("contiguous", torch.float32, True, True, True),
    ("channels_last", torch.float64, True, False, False),
]
MORE_OPERATORS = [
    (layout, *rest)
    for layout in LAYOUTS
    for rest in (
        (torch.float32, False, False, True),
        (torch.bfloat16, False, True, True),
        (torch.float16, True, True, False),
    )
]


@pytest.mark.parametrize(
    ("layout", "dtype", "masked", "relu", "bias"),
    [*OPERATORS, *(pytest.param(*p, marks=pytest.mark.slow) for p in MORE_OPERATORS)],
)
def test_the_operators_keep_their_promises(layout, dtype, masked, relu, bias):
    """What they say of shapes, strides, aliases and gradients, as compilers rely on it."""
    x = laid_out(torch.randn(2, 6, 5, 7), layout).to(dtype).detach()
    inputs = [x, torch.randn(4, 3, 3, 3).to(dtype), torch.randn(4).to(dtype) if bias else None]
    keys = draw_keys(x.shape, CPU) if masked else None
    options = [3, 3], [1, 2], [1, 0], [1, 1], 2, 0.1, masked, 1e-5, relu, 0.2 * masked
    y, numerator, *small = KNConv(*inputs, keys, *options)
    saved = [y if relu else numerator, *small]
    needs = [True, True, bias]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype in (torch.float32, torch.float64):
        tests.append("test_aot_dispatch_dynamic")
    arguments = *inputs, keys, [*saved], needs, *options
    torch.library.opcheck(KNConvBackward, (torch.randn_like(y), *arguments), test_utils=tests)
    arguments = *(t if t is None else t.requires_grad_() for t in inputs), keys, *options
    torch.library.opcheck(KNConv, arguments, test_utils=tests)


# make_fx, dispatch modes, checkpoints that select


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("training", [True, False])
def test_make_fx_after_use_traces_the_network(tracing_mode: str, training: bool):
    network = nn.Sequential(
        kn.KNConv2d(8, 8, 3, padding=1, activation="relu"), kn.KNConv2d(8, 4, 1)
    ).double().train(training).requires_grad_(False)  # fmt: skip
    x = torch.randn(2, 8, 12, 10, dtype=torch.float64)
    other = torch.randn_like(x) * 3 + 1
    network(x)
    traced = make_fx(network, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    torch.manual_seed(1)
    y = traced(other)
    torch.manual_seed(1)
    torch.testing.assert_close(y, network(other), rtol=1e-9, atol=1e-9)
    expected = {"kn_conv"} if tracing_mode == "real" else set()  # fake tensors are a subclass
    assert operators_of(traced) == expected


def test_make_fx_of_a_training_step():
    layer, x = kn.KNConv2d(4, 6, 3, activation="relu"), images()
    parameters = dict(layer.named_parameters())

    def step(parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        y = torch.func.functional_call(layer, parameters, (x,))
        return [*torch.autograd.grad(y.square().sum(), [*parameters.values()])]

    traced = make_fx(step)(parameters, x)
    assert operators_of(traced) == {"kn_conv", "kn_conv_backward"}
    torch.manual_seed(1)
    results = traced(parameters, x * 2)
    torch.manual_seed(1)
    assert_all_close(results, step(parameters, x * 2))


def test_fake_tensors_have_the_shapes_strides_and_dtypes(x: Tensor):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = conv_and_norm()[:2]  # the third pads, for which older fake tensors are contiguous
    for layout in ("contiguous", "channels_last"):
        inputs = laid_out(x, layout).detach().requires_grad_()
        y = module(inputs)
        with mode:
            fake = module(mode.from_tensor(inputs))
            fake.sum().backward()
        assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


class Recorder(TorchDispatchMode):
    """Counts the operators that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[object] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_dispatch_modes_see_the_operators_and_change_nothing(x: Tensor, training: bool):
    module = conv_and_norm()[:-1].train(training)  # a KernelNorm of pixels rounds in other orders
    parameters = [*module.parameters()]
    expected = run(module, x, parameters)
    with Recorder() as recorder:
        results = run(module, x, parameters)
    assert_all_close(results, expected, tolerance=0)
    assert recorder.seen[KNConv] == recorder.seen[KNConvBackward] == 2


def test_modes_around_the_backward_alone(x: Tensor):
    module = conv_and_norm()
    parameters = [*module.parameters()]
    expected = run(module, x, parameters)[2:]
    torch.manual_seed(7)
    loss = module(x).square().sum()
    with Recorder():
        results = torch.autograd.grad(loss, parameters)
    assert_all_close([*results], expected)


def test_flops_are_counted():
    """Those of the convolutions and its gradients, and of the sums over windows of one channel."""
    layer, twin = kn.KNConv2d(32, 48, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)
    x, totals = torch.randn(2, 32, 8, 8, requires_grad=True), []
    for module in (layer, twin):
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[1] == 3 * (2 * 2 * 8 * 8 * 48 * 32 * 9)
    assert totals[1] < totals[0] < 1.01 * totals[1]


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize(
    "kept", [torch.ops.aten.convolution.default, KNConv], ids=["convolutions", "layers"]
)
def test_checkpoints_that_keep_some_results(activation: str | None, kept: object):
    context = functools.partial(create_selective_checkpoint_contexts, [kept])
    layers = [kn.KNConv2d(8, 8, 3, padding=1, activation=activation) for _ in range(2)]
    network = nn.Sequential(*layers).double()
    x = torch.randn(2, 8, 12, 10, dtype=torch.float64)
    parameters = [*network.parameters()]
    expected = run(network, x, parameters)
    results = run(
        lambda x: checkpoint(network, x, use_reentrant=False, context_fn=context), x, parameters
    )
    assert_all_close(results, expected, tolerance=1e-9)


def test_who_gets_plain_operations(x: Tensor):
    class Sub(Tensor):
        pass

    assert not observers.needs_plain_operations(x, None, nn.Parameter(x))
    assert observers.needs_plain_operations(x, x.as_subclass(Sub))
    seen = []
    torch.func.vmap(lambda t: seen.append(observers.needs_plain_operations(t)) or t)(x)
    assert seen == [True]
    assert not observers.is_observed()
    with Recorder():
        assert observers.is_observed()


def test_subclasses_of_tensors_are_kept(x: Tensor):
    class Sub(Tensor):
        pass

    module = conv_and_norm()
    y = run(module, x, [*module.parameters()])
    torch.manual_seed(7)
    z = module(x.as_subclass(Sub))
    assert type(z) is Sub
    torch.testing.assert_close(z.as_subclass(Tensor), y[0])
