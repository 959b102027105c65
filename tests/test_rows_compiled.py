"""The compiled regions against the operations that they are made of, and the layers on top."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernelnorm import reference
from kernelnorm.functional import kn_conv
from kernelnorm.ops import rows_compiled, rows_for, rows_torch
from kernelnorm.ops.mask import Keys, draw_keys, spread_keys
from tests.strategies import mask_of

CPU = torch.device("cpu")

if not rows_compiled.supports(torch.zeros(1 << 16)):
    pytest.skip("no C++ compiler", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own parts


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Regions for small tensors too, and more of them than PyTorch compiles of one function."""
    for name in ("_LEAST", "_LEAST_OF_MOMENTS", "_LEAST_OF_EPILOGUE"):
        monkeypatch.setattr(rows_compiled, name, 0)
    yield
    torch.compiler.reset()


SHAPES = {
    "rows": (3, 20, 5, 7),
    "planes": (3, 20, 5, 7),
    "prefix": (3, 20, 5, 7),
    "one channel": (2, 1, 8, 9),
    "one pixel": (1, 40, 1, 1),
    "1-d": (4, 17, 30),
    "3-d": (2, 6, 3, 4, 5),
    "square": (1, 16, 4, 4),  # as many pixels as channels
}


def tensor(name: str, dtype: torch.dtype) -> Tensor:
    shape = SHAPES[name]
    if name == "rows":
        return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    if name == "prefix":
        n, c, h, w = shape
        return torch.randn(n, h, w, 2 * c, dtype=dtype)[..., :c].movedim(-1, 1)
    return torch.randn(shape, dtype=dtype)


def keys_of(x: Tensor, drop: bool) -> Keys | None:
    return spread_keys(draw_keys(x.shape, CPU), x.shape, 0.3) if drop else None


def assert_same(result: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("drop", [True, False])
def test_statistics_moments_and_input_gradient(name: str, drop: bool):
    x = tensor(name, torch.float32)
    keys = keys_of(x, drop)
    pair = rows_compiled.statistics(x, keys)
    torch.testing.assert_close(pair, rows_torch.statistics(x, keys), rtol=1e-4, atol=1e-5)
    arguments = (0.9, 1.1), 0.2, 1e-5, torch.float32
    assert_same(rows_compiled.moments(pair, *arguments), rows_torch.moments(pair, *arguments))

    pair, grad = torch.randn(2, len(x), 1, *x.shape[2:]), tensor(name, torch.float32)
    expected = rows_torch.input_gradient(grad, x, pair, keys)
    result = rows_compiled.input_gradient(grad, x, pair, keys)
    assert_same((result, grad), (expected, expected))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_epilogue_and_output_gradient(name: str, relu: bool, with_bias: bool):
    z, grad = tensor(name, torch.float32), tensor(name, torch.float32)
    mu, r = torch.randn(2, len(z), 1, *z.shape[2:]).unbind()
    r = r.abs() + 0.5
    sums, bias = torch.randn(z.shape[1]), torch.randn(z.shape[1]) if with_bias else None
    expected = rows_torch.epilogue(z.clone(), [mu], [-sums], r, bias, relu)
    y, numerator = rows_compiled.epilogue(z, [mu], [-sums], r, bias, relu)
    assert_same((y, numerator), expected)

    kept = y if numerator is None else numerator
    arguments = grad, kept, r, mu, sums, bias, relu, (0.7, 1.3)
    assert_same(rows_compiled.output_gradient(*arguments), rows_torch.output_gradient(*arguments))


def test_a_gradient_in_the_other_memory_format():
    kept = tensor("rows", torch.float32)
    grad = torch.randn(kept.shape)
    mu, r = torch.rand(2, 3, 1, 5, 7).unbind()
    arguments = grad, kept, r, mu, torch.randn(20), None, True, (0.7, 1.3)
    assert_same(rows_compiled.output_gradient(*arguments), rows_torch.output_gradient(*arguments))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("activation", ["relu", None])
def test_layer_agrees_with_equation_4(memory_format, kernel_size, activation):
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(5, 6, kernel_size, kernel_size, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, torch.randn(5, dtype=torch.float64))]
    assert rows_for(x) is rows_compiled
    mask = mask_of(3, x.shape, 0.1)
    padding = (kernel_size // 2,) * 2
    y = kn_conv(*inputs, 1, padding, dropout_p=0.1, activation=activation)
    expected = reference.kn_conv(*inputs, (1, 1), padding, (1, 1), 1, mask)
    expected = expected.relu() if activation else expected
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(y)
    assert_same(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_gradcheck():
    inputs = [torch.randn(1, 2, 3, 4), torch.randn(2, 2, 2, 2), torch.randn(2)]
    inputs = [t.double().requires_grad_() for t in inputs]

    def layer(x, weight, bias):
        torch.manual_seed(1)
        return kn_conv(x, weight, bias, 1, 1, dropout_p=0.3, activation="relu")

    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("mean", [1000.0])
def test_precision_where_the_mean_is_large(mean: float):
    x = torch.randn(2, 16, 12, 12) + mean
    weight = torch.randn(8, 16, 3, 3)
    y = kn_conv(x, weight, dropout_p=0.0)
    exact = kn_conv(x.double(), weight.double(), dropout_p=0.0)
    assert (y - exact).abs().max() < 1e-3 * exact.abs().max()


def test_all_sizes_share_a_region():
    compiled = []
    for shape in ((3, 5, 7, 9), (4, 6, 8, 10), (2, 30, 3, 3)):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        rows_compiled.statistics(x, keys_of(x, drop=True))
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len({*compiled}) == 1


def test_who_uses_it():
    x = torch.randn(2, 4, 8, 8)
    assert rows_for(x) is rows_compiled
    assert rows_for(x.bfloat16()) is rows_torch
    assert rows_for(x.to("meta")) is rows_torch
    assert torch.func.vmap(lambda t: t * (rows_for(t) is rows_torch))(x).any()


def test_without_a_compiler_there_is_another_way(monkeypatch: pytest.MonkeyPatch, caplog):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(rows_compiled, "_region", lambda _: broken)
    rows_compiled._works.cache_clear()
    assert rows_for(torch.randn(2, 4, 8, 8)) is rows_torch
    assert "no compiler" in caplog.text
    rows_compiled._works.cache_clear()


def test_flops_are_counted():
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        kn_conv(x, weight, padding=1).sum().backward()
    assert counter.get_total_flops() >= 2 * 2 * 2 * 64 * 6 * 4 * 9
