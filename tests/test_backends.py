"""Every backend against PyTorch operations in float64: the C kernels, and the Triton kernels.

Without a GPU the Triton kernels run in Triton's interpreter, with few examples since it is slow.
Whatever a kernel does not write is NaN.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kernelnorm as kn
from kernelnorm import reference
from kernelnorm.functional import kn_conv
from kernelnorm.ops import knconv
from kernelnorm.ops.backends import (
    Backend,
    Statistics,
    backend_for,
    compute_dtype,
    cpu,
    eager,
    triton,
)
from kernelnorm.ops.backends.triton import kernels as triton_kernels
from kernelnorm.ops.mask import (
    HASH_MULTIPLIER,
    count_keys,
    draw_keys,
    expand_keys,
    keep,
    keep_threshold,
)
from kernelnorm.ops.settings import Settings, constants
from kernelnorm.ops.windows import Geometry
from tests.strategies import EXPANDED, LAYOUTS, Case, cases, laid_out, mask_of

# The package has a function of the same name.
cpu_convolution = sys.modules["kernelnorm.ops.backends.cpu.convolution"]


class Tolerance(NamedTuple):
    """Errors as parts of the largest element: of a primitive, and of a whole layer."""

    primitive: float
    layer: float


# One step of rounding, or as many as a sum of a hundred has. Triton's interpreter cuts off the
# digits that bfloat16 has not.
TOLERANCES = {
    torch.float64: Tolerance(1e-13, 1e-12),
    torch.float32: Tolerance(1e-6, 1e-5),
    torch.bfloat16: Tolerance(2**-7, 2**-6),
    torch.float16: Tolerance(2**-10, 2**-9),
}
DTYPES = {
    "cpu": [torch.float32, torch.float64, torch.bfloat16],
    "triton": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
}
EPS = 0.01
"""Keeps rounding small where the variance is zero; test_precision.py has the default."""


class Subject:
    """A backend with the device of its tensors."""

    def __init__(self, param: str, device: torch.device) -> None:
        self.name, self.threads = param.split()[0], 3 if "threads" in param else 1
        self.device, self.backend = device, cpu if self.name == "cpu" else triton
        self.slow = self.name == "triton" and device.type == "cpu"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    @contextmanager
    def running(self, tile: int = 4096) -> Iterator[None]:
        """Layers run on this backend, small tensors in several blocks or threads as large ones."""
        forget()
        before = torch.get_num_threads()
        with on_backend(self.backend), ExitStack() as stack:
            if self.threads > 1:
                torch.set_num_threads(self.threads)
                stack.callback(torch.set_num_threads, before)
                stack.enter_context(mock.patch.object(cpu, "_ELEMENTS_PER_THREAD", 1))
            if self.name == "triton":
                stack.enter_context(mock.patch.multiple(triton, TILE=tile, PROGRAMS=2))
            yield
        forget()


def on_backend(backend: Backend) -> AbstractContextManager[object]:
    """Layers run on a backend if it supports their inputs."""
    return mock.patch.object(
        knconv, "backend_for", side_effect=lambda x: backend if backend.supports(x) else eager
    )


def forget() -> None:
    """Empties the caches of what follows from the numbers that :meth:`Subject.running` changes."""
    for module in (cpu, triton):
        for name, value in vars(module).items():
            if name.startswith("_") and hasattr(value, "cache_clear") and name != "_works":
                value.cache_clear()


@pytest.fixture(scope="session", params=["cpu", "cpu in 3 threads", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Subject:
    name = request.param.split()[0]
    if name == "cpu" and device.type != "cpu":
        pytest.skip("the C kernels are for CPUs")
    if name == "triton" and not triton_kernels.AVAILABLE:
        pytest.skip("Triton is not installed")
    subject = Subject(request.param, device)
    if not subject.supports(torch.ones(1, 1, 1, device=device)):
        pytest.skip(f"the backend {name} does not work here")
    return subject


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def on_random_cases(
    *strategies: st.SearchStrategy[Any], examples: int = 150
) -> Callable[[Callable[..., None]], Callable[[Subject], None]]:
    """Runs a test with random arguments on each backend.

    Triton's interpreter is slow, so it gets few and small ones.
    """

    def decorate(test: Callable[..., None]) -> Callable[[Subject], None]:
        def run(backend: Subject) -> None:
            def check(drawn: tuple[Any, ...]) -> None:
                test(backend, *drawn)

            check.__name__ = f"{test.__name__}_{backend.name}"  # the key of saved failures
            first = cases(wide=not backend.slow) if strategies[0] is CASE else strategies[0]
            drawn = st.tuples(first, *strategies[1:])
            count = -(-examples // 40) if backend.slow else examples
            settings(max_examples=count, deadline=None)(given(drawn)(check))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


CASE = cases(wide=True)


def double(arguments: Any) -> Any:
    if isinstance(arguments, Statistics):
        return Statistics(*map(double, arguments))
    if isinstance(arguments, (list, tuple)):
        return [double(x) for x in arguments]
    return arguments.double() if isinstance(arguments, Tensor) else arguments


def assert_same(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    unit: float | None = None,
    size: float = 0.0,
) -> None:
    """Up to what ``dtype`` rounds of the largest element, or of ``size``, and of that dtype."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    unit = max(unit or 0, TOLERANCES[dtype].primitive)
    scale = 1 + max(expected.abs().max().item() if expected.numel() else 0, size)
    torch.testing.assert_close(actual.double(), expected, rtol=unit, atol=unit * scale)


def assert_neighbours_are_untouched(x: Tensor) -> None:
    """Of a view: beside each of its elements there is a NaN."""
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    assert memory.isnan().sum() == len(memory) - x.numel()


LARGE = st.tuples(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 6, 8, 9, 24, 70]),
    st.one_of(
        st.tuples(st.sampled_from([1, 2, 5, 63, 64, 65, 130])),
        st.tuples(st.integers(1, 5), st.integers(1, 20)),
        st.tuples(*[st.integers(1, 4)] * 3),
    ),
).map(lambda drawn: (*drawn[:2], *drawn[2]))
"""Shapes of large tensors."""

DTYPE = st.sampled_from([0, 1, 2, 3])
LAYOUT, ANY_LAYOUT = st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS + EXPANDED)
SEED, TILE = st.integers(0, 2**31), st.sampled_from([128, 4096])
P = st.sampled_from([0.0, 0.3])
SLOPE = st.sampled_from([None, 0.0, 0.2])  # of no activation, of a ReLU and of a LeakyReLU
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
}
ACTIVATION = st.sampled_from([*ACTIVATIONS])


def dtype_of(backend: Subject, index: int) -> torch.dtype:
    dtypes = DTYPES[backend.name]
    return dtypes[index % len(dtypes)]


class Random:
    """Random tensors of a device, the same for the same seed."""

    def __init__(self, backend: Subject, seed: int) -> None:
        self.device, self.generator = backend.device, torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.device, dtype)


@on_random_cases(CASE, DTYPE, P, st.booleans(), st.booleans(), TILE)
def test_window_statistics(backend, case: Case, dtype, p, masked, with_means, tile):
    dtype = dtype_of(backend, dtype)
    x, keys = case.input(dtype, backend.device), case.keys(backend.device) if masked else None
    options = Settings(case.geometry, case.groups, p, masked, EPS, slope=None)
    expected = eager.window_statistics(x.double(), keys, options, with_means)
    with backend.running(tile):
        actual = backend.window_statistics(x, keys, options, with_means)
    # What is kept can be small beside the pixel's first channel, which is subtracted from it.
    unit = 1e-5 if masked and dtype != torch.float64 else None
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same(a, b, compute_dtype(x), unit)


@on_random_cases(
    LARGE, DTYPE, LAYOUT, st.integers(1, 2), st.sampled_from([1, 1, 2, 3]), st.booleans(),
    SLOPE, SEED, TILE,
)  # fmt: skip
def test_epilogue(backend, shape, dtype, layout, terms, groups, with_bias, slope, seed, tile):
    n, channels, *spatial = shape
    groups = groups if channels % groups == 0 else 1
    dtype, random = dtype_of(backend, dtype), Random(backend, seed)
    z = laid_out(random.randn(*shape, dtype=dtype), layout)
    wide = compute_dtype(z)
    terms = [
        (random.randn(n, groups, *spatial, dtype=wide), random.randn(channels, dtype=wide))
        for _ in range(terms)
    ]
    rstd = random.randn(n, 1, *spatial, dtype=wide)
    bias = random.randn(channels, dtype=dtype) if with_bias else None
    y, numerator = eager.epilogue(*double([z, terms, rstd, bias]), slope)
    memory = z.data_ptr()
    with backend.running(tile):
        actual = backend.epilogue(z, terms, rstd, bias, slope)
    assert_same(actual[0], y, dtype)
    assert (actual[1] is None) == (slope is not None)
    if numerator is not None:
        assert_same(actual[1], numerator, dtype)
    if groups == 1 and layout != "transposed":
        assert actual[1 if slope is None else 0].data_ptr() == memory
        assert_neighbours_are_untouched(z)


@on_random_cases(
    LARGE, DTYPE, LAYOUT, ANY_LAYOUT, st.booleans(), SLOPE, SEED, TILE
)  # fmt: skip
def test_epilogue_backward(backend, shape, dtype, layout, of_grad, with_bias, slope, seed, tile):
    n, channels, *spatial = shape
    dtype, random = dtype_of(backend, dtype), Random(backend, seed)
    kept = laid_out(random.randn(*shape, dtype=dtype), layout)
    grad = laid_out(random.randn(*shape, dtype=dtype), of_grad)
    wide = compute_dtype(kept)
    mu, rstd = (random.randn(n, 1, *spatial, dtype=wide) for _ in range(2))
    bias = random.randn(channels, dtype=dtype) if with_bias else None
    statistics = Statistics(mu, rstd.abs() + 0.5)
    arguments = [grad, kept, statistics, random.randn(channels, dtype=wide), bias]
    factors = 1 / 3, 1 / 7
    exact = [
        Statistics(*double(statistics[:2])) if a is statistics else double(a) for a in arguments
    ]
    expected = eager.epilogue_backward(*exact, slope, factors)
    with backend.running(tile):
        grad_z, pair, *vectors = backend.epilogue_backward(*arguments, slope, factors)
    assert_same(grad_z, expected[0], dtype)
    assert_same(pair, expected[1], wide, 1e-5 * (wide == torch.float32))
    assert_same(vectors[0], expected[2], wide)
    # A sum over what was rounded.
    unit = TOLERANCES[dtype].primitive * max(1, grad_z.numel() // channels) ** 0.5
    assert_same(vectors[1], expected[3], wide, unit)


@on_random_cases(CASE, DTYPE, LAYOUT, P, st.booleans(), TILE)
def test_statistics_backward(backend, case: Case, dtype, layout, p, masked, tile):
    dtype = dtype_of(backend, dtype)
    x, keys = case.input(dtype, backend.device), case.keys(backend.device) if masked else None
    options = Settings(case.geometry, case.groups, p, masked, EPS, slope=None)
    grad = laid_out(case.randn(*x.shape, dtype=dtype, device=backend.device), layout)
    positions = [case.geometry.positions(i, size) for i, size in enumerate(case.sizes)]
    pair = case.randn(len(x), 2, *positions, dtype=compute_dtype(x), device=backend.device)
    expected = eager.statistics_backward(*double([grad, x, pair]), keys, options)
    memory = grad.data_ptr()
    with backend.running(tile):
        actual = backend.statistics_backward(grad, x, pair, keys, options)
    assert_same(actual, expected, dtype)
    if layout != "transposed":
        assert actual.data_ptr() == memory
        assert_neighbours_are_untouched(grad)


@on_random_cases(
    CASE, DTYPE, ANY_LAYOUT, P, st.booleans(), SLOPE, st.booleans(),
    st.tuples(st.booleans(), st.booleans(), st.booleans()), TILE, )  # fmt: skip
def test_layer(backend, case: Case, dtype, of_grad, p, masked, slope, with_bias, needs, tile):
    options = Settings(case.geometry, case.groups, p, masked and p > 0, EPS, slope)
    check_layer(backend, case, dtype_of(backend, dtype), options, of_grad, with_bias, needs, tile)


def check_layer(
    subject: Subject,
    case: Case,
    dtype: torch.dtype,
    options: Settings,
    layout_of_grad: str,
    with_bias: bool,
    needs: Sequence[bool],
    tile: int = 4096,
) -> None:
    """A forward and a backward pass, the latter of the same saved tensors."""
    x, keys = case.input(dtype, subject.device), case.keys(subject.device)
    keys = keys if options.masked else None
    weight, bias = case.filters(dtype, subject.device)
    inputs = [x, weight, bias if with_bias else None]
    wide, unit = compute_dtype(x), TOLERANCES[dtype].layer
    if options.masked and x.shape[1] * math.prod(options.geometry.kernel_size) <= 4:
        unit *= 30  # the few elements are differences to the first, which may have been dropped
    with subject.running(tile):
        result = knconv.forward(knconv.backend_for(x), *inputs, keys, options)
    expected = knconv.forward(eager, *double(inputs), keys, options)
    # What the rounding of each product comes to: a few outputs can all be small by chance.
    products = eager.convolution(x.double().square(), weight.double().square(), options).sqrt()
    size = (products * expected.rstd).max().item() if products.numel() else 0.0
    scales = size, size, 0.0, 0.0, 0.0
    for a, b, of, scale in zip(
        result, expected, (dtype, dtype, wide, wide, wide), scales, strict=True
    ):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same(a, b, of, unit, scale)

    grad = laid_out(case.randn(*result.y.shape, dtype=dtype, device=subject.device), layout_of_grad)
    saved = [result.numerator if options.slope is None else result.y, *result[2:]]
    before = grad.clone()
    with subject.running(tile):
        results = knconv.backward(grad, *inputs, keys, saved, options, needs)
    assert torch.equal(grad, before)
    with on_backend(eager):
        exact = knconv.backward(grad.double(), *double(inputs), keys, double(saved), options, needs)
    assert [a is None for a in results] == [
        not need or t is None for t, need in zip(inputs, needs, strict=True)
    ]
    # Gradients are sums and differences of terms that were rounded, which can cancel.
    scales = [1 + b.abs().max().item() if b is not None and b.numel() else 1.0 for b in exact]
    of_z = (grad * result.rstd).abs().double()
    if of_z.numel():
        zeros, both = of_z.new_zeros(len(weight)), (True, True)
        terms = eager.convolution_backward(
            of_z, x.abs().double(), weight.abs().double(), result.mu, zeros, options, both
        )
        # So do the two ways through the statistics: in windows of one element they are opposites.
        factors = constants(options, x.shape[1])
        _, pair, *_ = eager.epilogue_backward(
            grad.double(), *double([saved[0], Statistics(*saved[1:3]), saved[3]]), inputs[2],
            options.slope, (factors.grad_mean, factors.grad_var),
        )  # fmt: skip
        zero = torch.zeros_like(x, dtype=torch.float64)
        through = eager.statistics_backward(zero, x.abs().double(), pair.abs(), None, options)
        scales[:2] = 1 + (terms[0] + through).max().item(), 1 + terms[1].max().item()
        scales[2] = 1 + grad.abs().double().sum().item() / len(weight) ** 0.5
    for a, b, tensor, scale in zip(results, exact, inputs, scales, strict=True):
        if a is not None:
            assert (a.shape, a.dtype) == (tensor.shape, tensor.dtype)
            torch.testing.assert_close(a.double(), b, rtol=unit, atol=2 * unit * scale)


@pytest.mark.parametrize("length", [*range(40, 45), 5])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_strides_that_leave_a_remainder(backend, length: int, layout: str):
    geometry = Geometry((2,), (3,), (1,), (1,))
    case = Case(geometry, (length,), 2, 1, 16, 8, layout, seed=length)
    options = Settings(geometry, 1, 0.0, False, EPS, slope=None)
    x, (weight, bias) = case.input(device=backend.device), case.filters(device=backend.device)
    with backend.running():
        y, numerator, *small = knconv.forward(backend, x, weight, bias, None, options)
        grad = case.randn(*y.shape, device=backend.device)
        arguments = grad, x, weight, bias, None, [numerator, *small], options, [True] * 3
        results = knconv.backward(*arguments)
    with on_backend(eager):
        expected = knconv.backward(*arguments)
    torch.testing.assert_close(results, expected, rtol=1e-11, atol=1e-11)


POINT = {d: Geometry((1,) * d, (1,) * d, (0,) * d, (1,) * d) for d in (1, 2, 3)}
MASKED_SHAPES = [(3, 4, 70), (2, 20, 5, 7), (1, 40, 9), (2, 9, 3, 2, 5)]
PROBABILITIES = [1 / 65536, 0.1, 65535 / 65536]


def masked(d: int, p: float) -> Settings:
    return Settings(POINT[d], 1, p, True, EPS, slope=None)


@pytest.mark.parametrize("shape", MASKED_SHAPES)
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_mask_of_the_backward_bit_by_bit(backend, shape, p, layout):
    keys = draw_keys(shape, backend.device)
    x = laid_out(torch.zeros(shape, device=backend.device), layout)
    pair = torch.zeros(shape[0], 2, *shape[2:], device=backend.device)
    pair[:, 0] = 1
    with backend.running():
        mask = backend.statistics_backward(
            torch.zeros_like(x), x, pair, keys, masked(len(shape) - 2, p)
        )
    assert torch.equal(mask, keep(expand_keys(keys, shape, p), mask.dtype))


@pytest.mark.parametrize("shape", MASKED_SHAPES)
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_mask_of_the_forward_bit_by_bit(backend, shape, p, layout):
    """Each channel has a power of two, so that a pixel's mean has all bits of its mask."""
    channels, ones = shape[1], [1] * (len(shape) - 2)
    keys, mask = draw_keys(shape, backend.device), None
    powers = 2.0 ** torch.arange(channels, dtype=torch.float64, device=backend.device)
    x = laid_out(powers.view(-1, *ones).expand(shape).clone(), layout)
    with backend.running():
        mu = backend.window_statistics(x, keys, masked(len(shape) - 2, p), False).mu
    mask = keep(expand_keys(keys, shape, p), torch.float64)
    bits = (mu * channels * (1 - round(p * 65536) / 65536)).round()
    assert torch.equal(bits, (mask * powers.view(-1, *ones)).sum(1, keepdim=True))


def test_the_smallest_hash_that_is_kept(backend):
    """Keys whose hashes lie around the threshold."""
    p = 0.3
    threshold, modulus = keep_threshold(p), 1 << 32

    def key_of(hash_: int) -> int:
        mixed = hash_ * pow(HASH_MULTIPLIER, -1, modulus) % modulus
        return mixed ^ mixed >> 15 ^ mixed >> 30

    offsets = [i for i in range(-40, 40) if key_of(threshold + i) % 2]  # keys are odd
    assert min(offsets) < 0 <= max(offsets)
    keys = torch.tensor([1, *(key_of(threshold + i) for i in offsets)]).to(torch.int32)
    keys, shape = keys.to(backend.device), (1, 1, len(offsets))
    kept = [[[float(i >= 0) for i in offsets]]]
    assert keep(expand_keys(keys, shape, p), torch.float64).tolist() == kept
    x = torch.ones(shape, dtype=torch.float64, device=backend.device)
    mu = backend.window_statistics(x, keys, masked(1, p), False).mu
    assert (mu > 0).double().tolist() == kept


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("channels", [2, 9])  # loops along the pixels, and along the channels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_not_a_number_stays_one(backend, channels: int, layout: str, with_bias: bool):
    """As it does in PyTorch's ReLU and its gradient."""
    for dtype in DTYPES[backend.name]:
        values = torch.tensor([torch.nan, -1.0, 0.0, 1.0, torch.inf, -torch.inf], dtype=dtype)
        z = values.expand(2, channels, 3, 6).contiguous().to(backend.device)
        z = laid_out(z, layout)
        one = torch.ones(2, 1, 3, 6, dtype=compute_dtype(z), device=backend.device)
        zero = torch.zeros(channels, dtype=one.dtype, device=backend.device)
        bias = zero.to(dtype) if with_bias else None
        with backend.running():
            y, _ = backend.epilogue(z.clone(), [(0 * one, zero)], one, bias, 0.0)
        assert torch.equal(y.nan_to_num(7), z.relu().nan_to_num(7))
        kept = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(kept.relu(), kept, torch.ones_like(z))
        statistics = Statistics(0 * one, one)
        with backend.running():
            grad_z, *_ = backend.epilogue_backward(
                torch.ones_like(z), z, statistics, zero, bias, 0.0, (1.0, 1.0)
            )
        assert torch.equal(grad_z, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("channels", [2, 9])
def test_a_pixel_that_is_not_finite_spoils_its_windows_only(backend, value: float, channels: int):
    geometry = Geometry((3, 2), (2, 1), (1, 0), (1, 1))
    options = Settings(geometry, 1, 0.0, False, EPS, slope=0.0)
    weight = torch.randn(4, channels, 3, 2, device=backend.device)
    for layout in ("contiguous", "channels_last"):
        x = torch.randn(2, channels, 9, 8, device=backend.device)
        x[1, 1, 4, 3] = value
        x = laid_out(x, layout)
        with backend.running():
            statistics = backend.window_statistics(x, None, options, False)
            y = knconv.forward(backend, x, weight, None, None, options).y
        expected = F.unfold(x[:, 1:2].isfinite().float(), (3, 2), stride=(2, 1), padding=(1, 0))
        padded = F.unfold(torch.ones_like(x[:, 1:2]), (3, 2), stride=(2, 1), padding=(1, 0))
        finite = (expected == padded).all(1).view(statistics.mu.shape)
        assert torch.equal(statistics.mu.isfinite(), finite)
        assert torch.equal(statistics.rstd.isfinite() & (statistics.rstd > 0), finite)
        assert y.isfinite()[:, :1][finite].all()


@on_random_cases(CASE, P, st.booleans(), ACTIVATION, st.booleans(), examples=100)
def test_layer_agrees_with_equation_4(backend, case: Case, p, with_bias, activation, plain):
    x = case.input(device=backend.device).requires_grad_()
    inputs = [x, *(t.requires_grad_() for t in case.filters(device=backend.device))]
    inputs = inputs[: 2 + with_bias]
    if case.in_channels * math.prod(case.geometry.kernel_size) == 1:
        return  # zero, on which side of it rounding decides
    mask = None if plain else mask_of(case.seed, x.shape, p, backend.device)
    _, stride, padding, dilation = case.geometry
    geometry = stride, padding, dilation, case.groups
    arguments = inputs if with_bias else [*inputs, None]
    with backend.running():
        y = kn_conv(
            *arguments, *geometry, dropout_p=p, activation=activation, training=not plain,
            evaluation="plain",
        )  # fmt: skip
        expected = reference.kn_conv(*arguments, *geometry, mask)
        expected = ACTIVATIONS[activation](expected)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        grad = torch.randn_like(expected)
        gradients = torch.autograd.grad(y, inputs, grad)
    for a, b in zip(gradients, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation):
    def layer(*inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        return kn_conv(*inputs, 1, 1, dropout_p=0.3, activation=activation)

    shapes = (1, 2, 2, 3), (2, 2, 2, 2), (2,)
    inputs = [
        torch.randn(s, dtype=torch.float64, device=backend.device).requires_grad_() for s in shapes
    ]
    with backend.running():
        assert torch.autograd.gradcheck(layer, inputs, fast_mode=backend.slow)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float32_with_a_mean_of_1000(backend, groups: int, layout: str):
    x = laid_out(torch.randn(2, 32, 8, 8, device=backend.device) + 1000, layout)
    weight = torch.randn(16, 32 // groups, 3, 3, device=backend.device) / 17 + 0.05
    grad = torch.randn(2, 16, 6, 6, device=backend.device)
    results = []
    with backend.running():
        for dtype in (torch.float32, torch.float64):
            inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
            y = kn_conv(*inputs, groups=groups, dropout_p=0)
            results.append([y, *torch.autograd.grad(y, inputs, grad.to(dtype))])
    for single, exact in zip(*results, strict=True):
        assert (single.double() - exact).norm() < 1e-3 * exact.norm()


def test_runs_repeat_bit_by_bit(backend):
    random = Random(backend, 3)
    grad, kept = random.randn(2, 2, 32, 9, 9, dtype=torch.float32)
    rstd, mu = random.randn(2, 2, 1, 9, 9, dtype=torch.float32).abs()
    sums = kept[0, :, 0, 0]
    first, second = (
        backend.epilogue_backward(grad, kept, Statistics(mu, rstd), sums, None, True, (1.0, 1.0))
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_bfloat16_rounds_to_nearest_and_ties_to_even(backend):
    """As PyTorch does. The interpreter of Triton cuts off instead."""
    if backend.slow:
        pytest.skip("the interpreter cuts off")
    bits = torch.randint(-(1 << 31), 1 << 31, (4000,), dtype=torch.int32)
    ties = (torch.arange(-2000, 2000, dtype=torch.int32) << 16) + (1 << 15)
    special = torch.tensor([0.0, -0.0, torch.nan, 3.4e38, -3.4e38, 1e-45])
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    values = values.to(backend.device)
    for shape in ((1, -1, 1), (1, 1, -1)):  # along the channels, and along the pixels
        z = torch.zeros(values.view(shape).shape, dtype=torch.bfloat16, device=backend.device)
        one = torch.ones(1, 1, z.shape[2], device=backend.device)
        ones = torch.ones(z.shape[1], device=backend.device)
        terms = [(one, -values) if shape[1] == -1 else (-values.view(one.shape), ones)]
        y, _ = backend.epilogue(z, terms, one, None, None)
        expected = values.to(torch.bfloat16)
        assert torch.equal(y.flatten().nan_to_num(7), expected.nan_to_num(7))


# What the C kernels have to themselves: threads, checks before a call, products of matrices.


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("masked", [True, False])
def test_threads_share_the_work(device, three_threads, layout: str, masked: bool):
    if device.type != "cpu":
        pytest.skip("the C kernels are for CPUs")
    geometry = Geometry((3, 3), (1, 2), (1, 1), (1, 1))
    case = Case(geometry, (70, 67), 2, 1, 12, 16, layout, seed=5)
    options = Settings(geometry, 1, 0.1, masked, 1e-5, slope=0.0)
    x, (weight, bias) = case.input(torch.float32), case.filters(torch.float32)
    assert x.numel() > 4 * cpu._ELEMENTS_PER_THREAD
    keys = case.keys() if masked else None
    runs = []
    for threads in (3, 3, 1):
        torch.set_num_threads(threads)
        y, _, *small = knconv.forward(cpu, x, weight, bias, keys, options)
        grad = case.randn(*y.shape, dtype=torch.float32)
        assert y.numel() > 4 * cpu._ELEMENTS_PER_THREAD
        saved = [y, *small]
        gradients = knconv.backward(grad, x, weight, bias, keys, saved, options, [True] * 3)
        runs.append([*saved, *gradients])
    for first, second, alone in zip(*runs, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)


def arguments_of_primitives() -> dict[str, dict[str, Any]]:
    """Arguments that the C kernels take, by the name of the primitive and of the argument."""
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    shape, one, vector = (2, 4, 6, 5), torch.ones(2, 1, 6, 5), torch.ones(4)
    x, options = torch.randn(shape), Settings(geometry, 1, 0.1, True, EPS, slope=None)
    keys = draw_keys(shape, x.device)
    return {
        "window_statistics": {"x": x, "keys": keys, "settings": options, "with_means": True},
        "epilogue": {
            "z": x.clone(), "terms": [(one, vector)] * 2, "rstd": one, "bias": vector,
            "slope": None,
        },
        "epilogue_backward": {
            "grad": x, "kept": x, "statistics": Statistics(one, one), "filter_sums": vector,
            "bias": vector, "slope": 0.0, "factors": (1.0, 1.0),
        },
        "statistics_backward": {
            "grad": x.clone(), "x": x, "pair": torch.ones(2, 2, 6, 5), "keys": keys,
            "settings": options,
        },
    }  # fmt: skip


def with_another(arguments: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    """The arguments with another tensor at a path such as ``("terms", 0, 1)``."""
    if not path:
        return value
    name, *rest = path
    changed = with_another(arguments[name], tuple(rest), value)
    if isinstance(arguments, dict):
        return {**arguments, name: changed}
    items = [*arguments[:name], changed, *arguments[name + 1 :]]
    return type(arguments)(*items) if isinstance(arguments, Statistics) else type(arguments)(items)


def at(arguments: Any, path: tuple[Any, ...]) -> Tensor:
    for name in path:
        arguments = arguments[name]
    return arguments


CHECKED = [
    ("window_statistics", ("keys",)),
    *[("epilogue", ("terms", i, j)) for i in range(2) for j in range(2)],
    *[("epilogue", (name,)) for name in ("rstd", "bias")],
    *[("epilogue_backward", (name,)) for name in ("grad", "kept", "filter_sums", "bias")],
    *[("epilogue_backward", ("statistics", i)) for i in range(2)],
    *[("statistics_backward", (name,)) for name in ("grad", "x", "pair", "keys")],
]
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one element": lambda x: x.flatten()[:1],
    "too few": lambda x: x[..., :-1],
    "too many": lambda x: torch.cat([x, x[:1]]),
    "none": lambda x: x[:0],
    "on another device": lambda x: x.to("meta"),
    "expanded": lambda x: x.flatten()[:1].expand(x.numel() + 1),
}
REFUSED = RuntimeError, NotImplementedError, IndexError


@pytest.mark.parametrize(("primitive", "path"), CHECKED, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_tensors_are_refused_before_they_are_read(primitive: str, path, fault: str):
    arguments = arguments_of_primitives()[primitive]
    getattr(cpu, primitive)(**arguments)
    wrong = FAULTS[fault](at(arguments, path))
    with pytest.raises(REFUSED):
        getattr(cpu, primitive)(**with_another(arguments, path, wrong))


@pytest.mark.parametrize(
    ("primitive", "path"),
    [(p, path) for p, path in CHECKED if path[0] in ("keys", "grad", "kept", "x")],
    ids=str,
)
def test_another_dtype_is_refused_before_it_is_read(primitive: str, path):
    arguments = arguments_of_primitives()[primitive]
    x = at(arguments, path)
    wrong = x.to(torch.int64 if x.dtype == torch.int32 else torch.float64)
    with pytest.raises(REFUSED):
        getattr(cpu, primitive)(**with_another(arguments, path, wrong))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.complex64])
@pytest.mark.parametrize(
    ("primitive", "name"),
    [("window_statistics", "x"), ("epilogue", "z"), ("statistics_backward", "x")],
)
def test_dtypes_that_no_kernel_has_are_refused(primitive: str, name: str, dtype):
    arguments = arguments_of_primitives()[primitive]
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises((RuntimeError, KeyError)):
        getattr(cpu, primitive)(**arguments)


def test_operators_with_arguments_that_do_not_fit_are_errors():
    """The checks of :mod:`kernelnorm.functional` are not in their way."""
    x, weight, bias = torch.randn(2, 5, 6, 6), torch.randn(6, 5, 3, 3), torch.randn(6)
    keys = draw_keys(x.shape, x.device)
    window = [3, 3], [1, 1], [1, 1], [1, 1]
    rest = 0.1, True, 1e-5, True, 0.0
    forward, backward = torch.ops.kernelnorm.kn_conv, torch.ops.kernelnorm.kn_conv_backward
    y, _, *small = forward(x, weight, bias, keys, *window, 1, *rest)
    for groups in (2, 3, 4, 7, 0, -1):
        for p in (0.1, 0.0):
            with pytest.raises((RuntimeError, ValueError, ZeroDivisionError)):
                forward(x, weight, bias, keys, *window, groups, p, *rest[1:])
    for wrong in (
        (x, weight, bias, keys[:-1]), (x, weight, bias[:-1], keys), (x[0], weight, bias, keys),
        (x[..., 0], weight, bias, keys),
        (x, weight[:, :3], bias, keys), (x, weight[:4], bias, keys),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            forward(*wrong, *window, 1, *rest)
    saved = [y, *small]
    grad = torch.ones_like(y)
    for i in range(4):
        wrong = [t.flatten()[:3] if i == j else t for j, t in enumerate(saved)]
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            backward(grad, x, weight, bias, keys, wrong, [True] * 3, *window, 1, *rest)
    for wrong in (grad[:, :1], grad[:1], grad[..., :1]):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            backward(wrong, x, weight, bias, keys, saved, [True] * 3, *window, 1, *rest)


def test_a_count_of_keys_is_that_of_the_drawn_ones():
    for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (0, 3, 4)):
        assert count_keys(shape) == draw_keys(shape, torch.device("cpu")).numel()


WINDOWS = [
    Geometry((3,), (1,), (1,), (1,)),
    Geometry((3, 3), (1, 1), (1, 1), (1, 1)),
    Geometry((1, 1), (2, 2), (0, 0), (1, 1)),
    Geometry((2, 3), (1, 3), (0, 2), (2, 1)),
    Geometry((2, 1, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2)),
]


@pytest.mark.parametrize("geometry", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_product_is_the_gradient_of_a_centred_convolution(geometry: Geometry, layout: str):
    d = len(geometry.kernel_size)
    x = laid_out(torch.randn(2, 5, *[7, 6, 8][:d], dtype=torch.float64), layout)
    weight = torch.randn(4, 5, *geometry.kernel_size, dtype=torch.float64, requires_grad=True)
    z = torch.convolution(
        x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, (0,) * d, 1
    )
    mu, grad_z = torch.randn(2, 1, *z.shape[2:], dtype=torch.float64), torch.randn_like(z)
    centred = z - mu * weight.sum([*range(1, 2 + d)]).view(-1, *[1] * d)
    (expected,) = torch.autograd.grad(centred, weight, grad_z)
    gradient = cpu_convolution.weight_gradient(grad_z, x, mu, geometry)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["weight", "input", "nothing"])
def test_layers_of_few_windows(monkeypatch: pytest.MonkeyPatch, training: bool, frozen: str):
    layer = kn.KNConv2d(256, 256, 3, padding=1, activation="relu").double().train(training)
    x = torch.randn(2, 256, 4, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    layer.weight.requires_grad_(frozen != "weight")
    inputs = [*layer.parameters(), x.requires_grad_(frozen != "input")]
    calls: list[int] = []

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        loss = layer(x).square().sum()
        return [*torch.autograd.grad(loss, [t for t in inputs if t.requires_grad])]

    weight_gradient = cpu_convolution.weight_gradient
    monkeypatch.setattr(
        cpu_convolution, "weight_gradient", lambda *a: calls.append(1) or weight_gradient(*a)
    )
    found = gradients()
    assert len(calls) == (frozen != "weight")
    monkeypatch.setattr(cpu_convolution, "product_is_faster", lambda *_: False)
    torch.testing.assert_close(found, gradients(), rtol=1e-9, atol=1e-9)


def test_many_windows_few_weights_and_groups_are_for_convolutions():
    weight = torch.zeros(256, 256, 3, 3)
    assert cpu_convolution.product_is_faster(weight, 32, 1)
    assert not cpu_convolution.product_is_faster(weight, 65, 1)
    assert not cpu_convolution.product_is_faster(weight[:128, :128], 32, 1)
    assert not cpu_convolution.product_is_faster(weight, 32, 2)


# Which backend a tensor gets.


def test_what_is_supported(backend):
    x = torch.ones(2, 3, 4, 4, device=backend.device)
    for dtype in DTYPES[backend.name]:
        assert backend.supports(x.to(dtype))
    assert backend.supports(nn.Parameter(x))
    assert not backend.supports(x.long())
    assert not backend.supports(x[:0])
    assert not backend.supports(x.to("meta"))


def test_others_run_in_pytorch_operations(device):
    x = torch.ones(2, 3, 4, 4)
    for other in (x.to("meta"), x.half(), x[:0], x.to(torch.float8_e4m3fn)):
        assert backend_for(other) is eager


def test_pytorch_operations_take_over_where_triton_fails(backend, monkeypatch, caplog):
    if backend.name != "triton":
        pytest.skip("Triton compiles in use")
    triton._works.cache_clear()
    monkeypatch.setattr(triton, "_launch", mock.Mock(side_effect=RuntimeError("no compiler")))
    for _ in range(2):
        assert not triton.supports(torch.ones(2, 3, 4, 4, device=backend.device))
    assert caplog.text.count("no compiler") == 1
    triton._works.cache_clear()


@pytest.mark.slow
def test_imports_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from kernelnorm.ops.backends import triton; assert not triton.supports(torch.ones(1, 1))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
