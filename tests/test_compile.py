"""The layers under torch.compile, and the operators that it calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kernelnorm as kn
from kernelnorm.ops.mask import draw_keys, expand_keys, keep
from tests.networks import (
    assert_all_close,
    conv_and_norm,
    images,
    layers_and_a_block,
    operators_of,
    run,
)
from tests.strategies import LAYOUTS, laid_out

CPU = torch.device("cpu")
KNConv = torch.ops.kernelnorm.kn_conv.default
KNConvBackward = torch.ops.kernelnorm.kn_conv_backward.default


@pytest.fixture
def x() -> Tensor:
    return images()


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "p", "training"),
    [
        ("eager", 0.1, True),
        ("aot_eager", 0.1, True),
        ("aot_eager", 0.0, True),
        ("aot_eager", 0.1, False),
    ],
)
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
    """Each value has a graph of its own, without breaks."""
    layer, x = kn.KNConv2d(4, 8, 3, activation="relu"), torch.randn(2, 4, 9, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for step in range(8):  # PyTorch keeps no more graphs
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
    for batch in (x, x[:2], x) if memory_format == torch.contiguous_format else (x,):
        batch = batch.contiguous(memory_format=memory_format)
        # It draws its own random numbers: a seed repeats, but is not the one of eager mode.
        first = run(compiled, batch, parameters)
        assert_all_close(run(compiled, batch, parameters), first, tolerance=0)
    module.eval()
    assert_all_close(run(compiled, batch, parameters), run(module, batch, parameters))
    module.train()
    for layer in layers:
        layer.dropout_p = 0.0
    assert_all_close(run(compiled, batch, parameters), run(module, batch, parameters))


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
    for layout, rest in zip(
        LAYOUTS,
        2
        * (
            (torch.float32, False, False, True),
            (torch.bfloat16, False, True, True),
            (torch.float16, True, True, False),
        ),
        strict=True,
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("padding", [0, 7])
def test_the_operators_keep_their_promises_where_onednn_is_wrong(dtype, groups, padding):
    """Outputs of width one, and windows of nothing but padding, are computed in another way."""
    x = laid_out(torch.randn(2, 6, 5, 3), "channels_last").to(dtype).detach()
    weight = torch.randn(6, 6 // groups, 3, 3).to(dtype)
    options = [3, 3], [1, 1], [padding, 0], [1, 1], groups, 0.1, False, 1e-5, True, 0.0
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(KNConv, (x, weight, None, None, *options), test_utils=tests)


@pytest.mark.slow
def test_a_compiled_layer_whose_output_is_narrow():
    layer = kn.KNConv2d(16, 16, 3, groups=16, activation="relu").eval()
    x = torch.randn(2, 16, 8, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled = torch.compile(layer)
        torch.testing.assert_close(compiled(x), layer(x))


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
