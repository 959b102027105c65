"""Every primitive and the whole layer, against PyTorch operations in float64 and Equation 4."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernelnorm import reference
from kernelnorm.functional import kn_conv
from kernelnorm.ops import passes
from kernelnorm.ops.backends import Statistics, compute_dtype, eager
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry
from tests.oracle import (
    DTYPES,
    EPS,
    TOLERANCES,
    Random,
    Subject,
    assert_same,
    check_layer,
    double,
    on_backend,
)
from tests.strategies import EXPANDED, LAYOUTS, Case, cases, laid_out, mask_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def on_random_cases(
    *strategies: st.SearchStrategy[Any], examples: int = 150
) -> Callable[[Callable[..., None]], Callable[[Subject], None]]:
    """Run a test with random arguments on each backend.

    Triton's interpreter is slow, so it gets few and small ones. Several threads run the code of
    one, on parts of the tensors.
    """

    def decorate(test: Callable[..., None]) -> Callable[[Subject], None]:
        def run(backend: Subject) -> None:
            def check(drawn: tuple[Any, ...]) -> None:
                test(backend, *drawn)

            check.__name__ = f"{test.__name__}_{backend.name}"  # the key of saved failures
            first = cases(wide=not backend.slow) if strategies[0] is CASE else strategies[0]
            drawn = st.tuples(first, *strategies[1:])
            count = examples // 3 if backend.threads > 1 else examples
            count = -(-examples // 40) if backend.slow else count
            settings(max_examples=count, deadline=None)(given(drawn)(check))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


CASE = cases(wide=True)


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
    # Sums over the positions, of terms that may cancel; the second one of what was rounded.
    positions = max(1, grad_z.numel() // channels)
    assert_same(vectors[0], expected[2], wide, size=positions * grad.abs().double().max().item())
    assert_same(vectors[1], expected[3], wide, TOLERANCES[dtype].primitive * positions**0.5)


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


@pytest.mark.parametrize("length", [*range(40, 45), 5])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_strides_that_leave_a_remainder(backend, length: int, layout: str):
    geometry = Geometry((2,), (3,), (1,), (1,))
    case = Case(geometry, (length,), 2, 1, 16, 8, layout, seed=length)
    options = Settings(geometry, 1, 0.0, False, EPS, slope=None)
    x, (weight, bias) = case.input(device=backend.device), case.filters(device=backend.device)
    with backend.running():
        y, numerator, *small = passes.forward(x, weight, bias, None, options, backend)
        grad = case.gradient(y)
        arguments = grad, x, weight, bias, None, [numerator, *small], options, [True] * 3
        results = passes.backward(*arguments)
    with on_backend(eager):
        expected = passes.backward(*arguments)
    torch.testing.assert_close(results, expected, rtol=1e-11, atol=1e-11)


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
