"""The Triton kernels against the PyTorch operations: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernelnorm import KNConv2d, reference
from kernelnorm.functional import kn_conv
from kernelnorm.ops import knconv, primitives_of, rows_torch
from kernelnorm.ops.mask import Keys, draw_keys, keep, spread_keys
from tests.strategies import Case, cases, mask_of

pytest.importorskip("triton")
from kernelnorm.ops import rows_triton

LAYOUTS = [
    "contiguous",
    "channels_last",
    "slice of contiguous",
    "slice of channels_last",
    "strided",
    "transposed",
]
# One step of rounding, or as many as a sum of a hundred has. The interpreter cuts off the digits
# that bfloat16 has not.
UNITS = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


@pytest.fixture
def seam(monkeypatch):
    """Layers run on Triton where it supports their inputs."""
    monkeypatch.setattr(
        knconv,
        "primitives_for",
        lambda x: primitives_of(rows_triton if rows_triton.supports(x) else rows_torch),
    )
    with blocks(PROGRAMS=1):
        yield


@dataclass(frozen=True)
class Rows:
    """Random arguments of the row primitives."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tile: int
    layouts: tuple[str, str]
    masked: bool
    relu: bool
    with_bias: bool
    maps: int
    into: bool  # whether an output has its own place
    seed: int

    def randn(self, *shape: int, dtype: torch.dtype, device) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + sum(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def large(self, which: int, device) -> Tensor:
        x = self.randn(which, *self.shape, dtype=self.dtype, device=device)[-1].clone()
        return laid_out(x, self.layouts[which - 1])

    def pixel_maps(self, count: int, device) -> list[Tensor]:
        shape = count, self.shape[0], 1, *self.shape[2:]
        return list(self.randn(*shape, dtype=self.narrow, device=device))

    def vectors(self, count: int, device) -> list[Tensor]:
        return list(self.randn(count, self.shape[1], dtype=self.narrow, device=device))

    def bias(self, device) -> Tensor | None:
        bias = self.randn(self.shape[1], dtype=self.dtype, device=device)
        return bias if self.with_bias else None

    def keys(self, device) -> Keys | None:
        keys = spread_keys(draw_keys(self.shape, device), self.shape, 0.3)
        return keys if self.masked else None

    @property
    def narrow(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @contextmanager
    def small_blocks(self) -> Iterator[None]:
        """Rows and maps of more than one block; whatever a kernel does not write is NaN."""
        poisoned = {name: nan_instead_of(getattr(torch, name)) for name in ("empty", "empty_like")}
        with blocks(TILE=self.tile, PROGRAMS=2), mock.patch.multiple(torch, **poisoned):
            yield


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    d = draw(st.sampled_from([1, 2, 2, 3]))
    return Rows(
        shape=(
            draw(st.integers(0, 3)),
            draw(st.sampled_from([1, 2, 3, 5, 70, 70])),
            *(draw(st.integers(1, 4)) for _ in range(d)),
        ),
        dtype=draw(st.sampled_from([*UNITS])),
        tile=draw(st.sampled_from([128, 4096])),
        layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        masked=draw(st.booleans()),
        relu=draw(st.booleans()),
        with_bias=draw(st.booleans()),
        maps=draw(st.integers(1, 2)),
        into=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@contextmanager
def blocks(**constants: int) -> Iterator[None]:
    """Other block sizes than a GPU's: the interpreter takes its time for each program."""
    rows_triton._tiles.cache_clear()
    with mock.patch.multiple(rows_triton, **constants):
        yield
    rows_triton._tiles.cache_clear()


def nan_instead_of(empty):
    return lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    base = torch.cat([x, torch.full_like(x, torch.nan)], 1) if "slice" in layout else x
    if "channels_last" in layout:
        base = base.movedim(1, -1).contiguous().movedim(-1, 1)
    return base[:, : x.shape[1]]


def double(arguments):
    if isinstance(arguments, list):
        return [double(x) for x in arguments]
    return arguments.double() if isinstance(arguments, Tensor) else arguments


def assert_same(actual, expected, dtype: torch.dtype, unit: float | None = None) -> None:
    """Up to what ``dtype`` rounds, as part of the largest element, and to the same dtype."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    unit = max(unit or 0, UNITS[dtype])
    scale = 1 + (expected.abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(actual.double(), expected, rtol=unit, atol=unit * scale)


@settings(max_examples=100, deadline=None)
@given(rows())
def test_statistics(device, case: Rows):
    x, keys = case.large(1, device) + 1, case.keys(device)
    with case.small_blocks():
        pair = rows_triton.statistics(x, keys)
    unit = 1e-13 if case.dtype == torch.float64 else 1e-6
    assert_same(pair, rows_torch.statistics(x.double(), keys), torch.float64, unit)


@settings(max_examples=15, deadline=None)
@given(rows())
def test_moments(device, case: Rows):
    mean, deviation = double(case.pixel_maps(2, device))
    var = (deviation.square() + 1) * deviation.sign()  # rounding can make it negative
    sums = torch.stack([mean, mean.square() + var]) * 7
    sums = torch.cat([sums] * 40, 1)  # of more than one block
    arguments = (1 / 7, 1 / 7), 0.1, 1e-5, case.narrow
    with case.small_blocks():
        results = rows_triton.moments(sums, *arguments)
    for actual, expected in zip(results, rows_torch.moments(sums, *arguments), strict=True):
        assert_same(actual, expected.double(), case.narrow)


@settings(max_examples=100, deadline=None)
@given(rows())
def test_epilogue(device, case: Rows):
    z, bias = case.large(1, device), case.bias(device)
    *maps, r = case.pixel_maps(case.maps + 1, device)
    vectors = case.vectors(case.maps, device)
    y, numerator = rows_torch.epilogue(*double([z, maps, vectors, r, bias]), case.relu)
    memory, into = z.data_ptr(), None
    if case.into and case.layouts[1] != "transposed":
        into = laid_out(torch.full_like(z, torch.nan), case.layouts[1])
    with case.small_blocks():
        actual = rows_triton.epilogue(z, maps, vectors, r, bias, case.relu, into)
    assert_same(actual[0], y, case.dtype)
    assert (actual[1] is None) == case.relu
    if numerator is not None:
        assert_same(actual[1], numerator, case.dtype)
    if into is not None:
        assert actual[0] is into
        assert_neighbours_are_untouched(into)
    elif case.layouts[0] != "transposed":
        assert actual[0 if case.relu else 1].data_ptr() == memory
        assert_neighbours_are_untouched(z)


@settings(max_examples=100, deadline=None)
@given(rows())
def test_output_gradient(device, case: Rows):
    grad, kept, bias = case.large(2, device), case.large(1, device), case.bias(device)
    r, mu = case.pixel_maps(2, device)
    arguments = [grad, kept, r.abs() + 0.5, mu, *case.vectors(1, device), bias]
    rest = case.relu, (1 / 3, 1 / 7)
    expected = rows_torch.output_gradient(*double(arguments), *rest)
    with case.small_blocks():
        grad_z, pair, *vectors = rows_triton.output_gradient(*arguments, *rest)
    assert_same(grad_z, expected[0], case.dtype)
    assert_same(pair, expected[1], case.narrow, 1e-5 * (case.narrow == torch.float32))
    assert_same(vectors[0], expected[2], case.narrow)
    # A sum over what was rounded.
    unit = UNITS[case.dtype] * max(1, grad_z.numel() // grad_z.shape[1]) ** 0.5
    assert_same(vectors[1], expected[3], case.narrow, unit)


@settings(max_examples=100, deadline=None)
@given(rows())
def test_input_gradient(device, case: Rows):
    grad, x, keys = case.large(2, device), case.large(1, device), case.keys(device)
    pair = torch.stack(case.pixel_maps(2, device))
    expected = rows_torch.input_gradient(*double([grad, x, pair]), keys)
    memory = grad.data_ptr()
    with case.small_blocks():
        actual = rows_triton.input_gradient(grad, x, pair, keys)
    assert_same(actual, expected, case.dtype)
    if case.layouts[1] != "transposed":
        assert actual.data_ptr() == memory
        assert_neighbours_are_untouched(grad)


def assert_neighbours_are_untouched(x: Tensor) -> None:
    """Of a view: beside each of its elements there is a NaN."""
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    assert memory.isnan().sum() == len(memory) - x.numel()


@pytest.mark.parametrize("shape", [(2, 70, 5, 7), (3, 4, 11)])
@pytest.mark.parametrize("p", [1 / 65536, 0.1, 0.5, 65535 / 65536])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_mask_bit_by_bit(device, shape, p, layout):
    keys = spread_keys(draw_keys(shape, device), shape, p)
    x = laid_out(torch.zeros(shape, device=device), layout)
    pair = torch.zeros(2, shape[0], 1, *shape[2:], device=device)
    pair[0] = 1
    with blocks(PROGRAMS=2):
        mask = rows_triton.input_gradient(torch.zeros_like(x), x, pair, keys)
    assert torch.equal(mask, keep(keys, mask.dtype))


def test_the_smallest_hash_that_is_kept(device):
    """An element whose hash is the threshold: that of zero is zero."""
    zero = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    x = torch.ones(1, 1, 1, device=device)
    for first_kept in (-1, 0, 1):
        keys = Keys(zero, zero[0], first_kept)
        square = rows_triton.statistics(x, keys)[1].item()
        assert square == keep(keys, x.dtype).item() == (first_kept <= 0)


def test_not_a_number_stays_one(device):
    """As it does in PyTorch's ReLU and its gradient."""
    z = torch.tensor([[[torch.nan, -1.0, 1.0]]], device=device)
    one, vector = torch.ones_like(z), torch.zeros(1, device=device)
    y, _ = rows_triton.epilogue(z, [one], [vector], one, None, True)
    assert y.isnan().tolist() == [[[True, False, False]]]
    grad_z, *_ = rows_triton.output_gradient(one, y, one, one, vector, None, True, (1.0, 1.0))
    assert grad_z.tolist() == [[[1, 0, 1]]]


def test_runs_repeat_bit_by_bit(device):
    grad, kept = torch.randn(2, 2, 32, 9, 9, device=device)
    r, mu = torch.rand(2, 2, 1, 9, 9, device=device)
    first, second = (
        rows_triton.output_gradient(grad, kept, r, mu, kept[0, :, 0, 0], None, True, (1.0, 1.0))
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_what_is_supported(device):
    x = torch.ones(2, 3, 4, 4, device=device)
    for dtype in UNITS:
        assert rows_triton.supports(x.to(dtype))
    assert rows_triton.supports(nn.Parameter(x))
    assert not rows_triton.supports(x.long())
    seen = []
    torch.vmap(lambda x: seen.append(rows_triton.supports(x)) or x)(x)
    assert seen == [False]


def test_other_backends_take_over_where_it_fails(device, monkeypatch, caplog):
    rows_triton._works.cache_clear()
    monkeypatch.setattr(rows_triton, "_launch", mock.Mock(side_effect=RuntimeError("no compiler")))
    assert not rows_triton.supports(torch.ones(2, 3, 4, 4, device=device))
    assert "no compiler" in caplog.text
    rows_triton._works.cache_clear()


def test_imports_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from kernelnorm.ops import rows_triton; assert not rows_triton.supports(torch.ones(1, 1))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@settings(max_examples=12, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.3]), st.booleans(), st.sampled_from([None, "relu"]))
def test_layer_agrees_with_equation_4(device, case: Case, p, with_bias, activation):
    x = case.input(device=device).requires_grad_()
    inputs = [x, *(t.requires_grad_() for t in case.filters(device=device))][: 2 + with_bias]
    mask = mask_of(case.seed, x.shape, p, device)
    _, stride, padding, dilation = case.geometry
    geometry = stride, padding, dilation, case.groups
    arguments = inputs if with_bias else [*inputs, None]
    triton = primitives_of(rows_triton)
    with mock.patch.object(knconv, "primitives_for", return_value=triton), blocks(PROGRAMS=1):
        y = kn_conv(*arguments, *geometry, dropout_p=p, activation=activation)
        expected = reference.kn_conv(*arguments, *geometry, mask)
        expected = expected.relu() if activation else expected
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        grad = torch.randn_like(expected)
        for a, b in zip(
            torch.autograd.grad(y, inputs, grad),
            torch.autograd.grad(expected, inputs, grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradcheck(device, seam, activation):
    def layer(*inputs):
        torch.manual_seed(1)
        return kn_conv(*inputs, 1, 1, dropout_p=0.3, activation=activation)

    shapes = (1, 2, 2, 3), (2, 2, 2, 2), (2,)
    inputs = [torch.randn(s, dtype=torch.float64, device=device).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_with_a_mean_of_1000(device, seam, groups, memory_format):
    x = torch.randn(2, 32, 8, 8, device=device) + 1000
    x = x.contiguous(memory_format=memory_format)
    weight = torch.randn(16, 32 // groups, 3, 3, device=device) / 17 + 0.05
    grad = torch.randn(2, 16, 6, 6, device=device)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        y = kn_conv(*inputs, groups=groups, dropout_p=0)
        results.append([y, *torch.autograd.grad(y, inputs, grad.to(dtype))])
    for single, exact in zip(*results, strict=True):
        assert (single.double() - exact).norm() < 1e-3 * exact.norm()


OPERATORS = {"statistics", "moments", "epilogue"}
GRADIENTS = {"output_gradient", "input_gradient"}


def operators_of(module: torch.fx.GraphModule) -> set[str]:
    """The names of this library's operators that a graph calls."""
    targets = [
        str(node.target)
        for part in module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
    ]
    return {target.split(".")[1] for target in targets if target.startswith("kernelnorm.")}


@pytest.fixture
def layers(device, seam) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        KNConv2d(3, 4, 3, activation="relu"), KNConv2d(4, 2, 2, bias=False)
    ).to(device)  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_compile_sees_the_operators(device, layers, training):
    layers.train(training)
    seen = set()

    def backend(module: torch.fx.GraphModule, inputs):
        seen.update(operators_of(module))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    x = torch.randn(2, 3, 6, 5, device=device)
    results = []
    for module in (compiled, layers):
        inputs = [x.clone().requires_grad_(), *layers.parameters()]
        torch.manual_seed(3)
        y = module(inputs[0])
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    torch.testing.assert_close(*results)
    assert seen == OPERATORS | GRADIENTS


@pytest.mark.parametrize("strict", [True, False])
def test_export_sees_the_operators(device, layers, strict):
    layers.eval()
    x = torch.randn(2, 3, 6, 5, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layers, (x,), strict=strict, dynamic_shapes=({0: batch},))
    assert operators_of(program.graph_module) == OPERATORS
    for inputs in (x, x[:1], torch.randn(5, 3, 6, 5, device=device)):
        torch.testing.assert_close(program.module()(inputs), layers(inputs))


def test_export_to_onnx_does_without_them(device, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.ones(2, 3, 4, 4, device=device)
    assert rows_triton.supports(x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert not rows_triton.supports(x)
