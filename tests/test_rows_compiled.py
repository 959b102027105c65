"""The compiled loops against the operations that they are made of, and the layers on top."""

from __future__ import annotations

import shutil
import sys
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernelnorm import reference
from kernelnorm.functional import kn_conv
from kernelnorm.ops import DIFFERENTIABLE, pointwise, primitives_for, rows_compiled, rows_torch
from kernelnorm.ops.mask import draw_keys
from kernelnorm.ops.windows import Geometry
from tests.strategies import mask_of

CPU = torch.device("cpu")

if shutil.which("c++") is None and sys.platform == "linux":
    pytest.skip("no C++ compiler", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own parts


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_compiled, "_LEAST", 0)


GEOMETRIES = {
    "same size": Geometry((3, 3), (1, 1), (1, 1), (1, 1)),
    "valid, stride 2": Geometry((3, 3), (2, 2), (0, 0), (1, 1)),
    "a pixel": Geometry((1, 1), (1, 1), (0, 0), (1, 1)),
    "every other pixel": Geometry((1, 1), (2, 2), (0, 0), (1, 1)),
    "two sides": Geometry((2, 3), (1, 3), (0, 2), (2, 1)),
    "a line": Geometry((4,), (3,), (2,), (1,)),
    "a volume": Geometry((2, 1, 2), (1, 1, 2), (1, 0, 0), (1, 1, 1)),
}
SIZES = {  # of samples, channels, and of each dimension beyond the window's reach
    "some": (3, 20, 4),
    "one of each": (1, 1, 0),
    "one channel": (2, 1, 5),
    "three channels": (2, 3, 20),
    "one sample": (1, 40, 1),
    "as many pixels as channels": (2, 9, 0),
    "many": (2, 130, 9),
}


def laid(x: Tensor, layout: str) -> Tensor:
    if layout == "rows":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "slices":
        longer = torch.cat([x, torch.full_like(x, torch.nan)], 1)
        return laid(longer, "rows")[:, : x.shape[1]]
    if layout == "neither":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x.contiguous()


def randn(*shape: int) -> Tensor:
    """In float64: where sums cancel, two orders of rounding in float32 differ by any amount."""
    return torch.randn(shape, dtype=torch.float64)


def input_of(geometry: Geometry, sizes: str, layout: str) -> Tensor:
    n, c, more = SIZES[sizes]
    reaches = [geometry.reach(i) for i in range(len(geometry.stride))]
    return laid(randn(n, c, *(reach + more + i for i, reach in enumerate(reaches))), layout)


def assert_same(result: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def check_statistics(geometry: Geometry, layout: str, drop: bool, least: int = 2) -> None:
    """Of all sizes, which share the loops; with few channels there are loops for each number.

    Args:
        least: channels
    """
    every = geometry is GEOMETRIES["same size"]
    for sizes in [name for name, (_, c, _) in SIZES.items() if every or c >= least]:
        x = input_of(geometry, sizes, layout)
        keys = draw_keys(x.shape, CPU) if drop else None
        weight = laid(randn(5, x.shape[1], *geometry.kernel_size), layout)
        arguments = x, weight, keys, 0.3, geometry, 1e-5, x.dtype
        results = rows_compiled.window_statistics(*arguments)
        assert_same(results, DIFFERENTIABLE.window_statistics(*arguments))

        grad, pair = laid(randn(*x.shape), layout), randn(2, *results[0].shape)
        others = x, pair, randn(5), keys, 0.3, geometry
        for total in (None, randn(*x.shape)) if every or x.shape[1] > 8 else (None,):
            results, expected = (
                primitives.through_statistics(
                    grad.clone(),
                    weight.clone(),
                    *others,
                    None if total is None else laid(total, "slices"),
                )
                for primitives in (rows_compiled, DIFFERENTIABLE)
            )
            assert_same(results, expected)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_statistics_and_the_gradient_through_them(name: str):
    check_statistics(GEOMETRIES[name], "rows", drop=True)


@pytest.mark.parametrize("layout", ["planes", "slices", "neither"])
def test_statistics_in_other_layouts(layout: str):
    check_statistics(GEOMETRIES["valid, stride 2"], layout, drop=True)


@pytest.mark.parametrize("copied", [True, False])
def test_slices_are_copied_for_a_convolution(copied: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pointwise, "_products_are_fast", lambda: not copied)
    check_statistics(GEOMETRIES["a pixel"], "slices", drop=True, least=8)
    x = input_of(GEOMETRIES["a pixel"], "some", "slices")
    arguments = None, 0.3, GEOMETRIES["a pixel"], 1e-5, x.dtype
    *_, read = rows_compiled.window_statistics(x, randn(5, x.shape[1], 1, 1), *arguments)
    assert (read.stride() != x.stride()) == copied


def test_expected_statistics():
    check_statistics(GEOMETRIES["valid, stride 2"], "rows", drop=False)


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_epilogue_and_output_gradient(layout: str, relu: bool, with_bias: bool):
    for sizes in SIZES:
        z = input_of(GEOMETRIES["a pixel"], sizes, layout)
        mu, r = randn(2, len(z), 1, *z.shape[2:]).unbind()
        r = r.abs() + 0.5
        sums, bias = randn(z.shape[1]), randn(z.shape[1]) if with_bias else None
        original = z.clone()
        expected = rows_torch.epilogue(original, [mu], [-sums], r, bias, relu)
        y, numerator = rows_compiled.epilogue(z, [mu], [-sums], r, bias, relu)
        assert_same((y, numerator), expected)
        for of_into in ("slices", "neither") if with_bias else ():
            into = laid(torch.full_like(y, torch.nan), of_into)
            z.copy_(original)
            results = rows_compiled.epilogue(z, [mu], [-sums], r, bias, relu, into)
            assert results[0] is into
            assert_same(results, expected)

        kept = y if numerator is None else numerator
        for of_grad in ("rows", "planes", "slices", "neither"):
            grad = laid(randn(*z.shape), of_grad)
            if of_grad == "slices":
                kept = laid(kept, of_grad)
            arguments = grad, kept, r, mu, sums, bias, relu, (0.7, 1.3)
            expected = rows_torch.output_gradient(*arguments)
            assert_same(rows_compiled.output_gradient(*arguments), expected)


@pytest.mark.parametrize(
    ("memory_format", "kernel_size", "activation"),
    [(torch.channels_last, 3, "relu"), (torch.contiguous_format, 1, None)],
)
def test_layer_agrees_with_equation_4(memory_format, kernel_size, activation):
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(5, 6, kernel_size, kernel_size, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, torch.randn(5, dtype=torch.float64))]
    assert primitives_for(x).epilogue is rows_compiled.epilogue
    mask = mask_of(3, x.shape, 0.1)
    padding = (kernel_size // 2,) * 2
    y = kn_conv(*inputs, 1, padding, dropout_p=0.1, activation=activation)
    expected = reference.kn_conv(*inputs, (1, 1), padding, (1, 1), 1, mask)
    expected = expected.relu() if activation else expected
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel_size", [3, 9])
def test_tensors_that_are_parts_of_others(kernel_size: int):
    """Windows of 9 have sums that are not compiled, and an epilogue that is."""
    x = torch.randn(2 * 6 * 12 * 11 + 1)[1:].view(2, 12, 11, 6).movedim(-1, 1)
    weight = torch.randn(5, 12, kernel_size, kernel_size)[:, ::2]
    inputs = [t.detach().requires_grad_() for t in (x, weight, torch.randn(10)[::2])]
    mask = mask_of(3, x.shape, 0.1)
    y = kn_conv(*inputs, padding=1, activation="relu")
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = reference.kn_conv(*wide, (1, 1), (1, 1), (1, 1), 1, mask).relu()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn(y.shape)
    for a, b in zip(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(expected, wide, grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def test_gradcheck():
    inputs = [torch.randn(1, 2, 3, 4), torch.randn(2, 2, 2, 2), torch.randn(2)]
    inputs = [t.double().requires_grad_() for t in inputs]

    def layer(x, weight, bias):
        torch.manual_seed(1)
        return kn_conv(x, weight, bias, 1, 1, dropout_p=0.3, activation="relu")

    assert torch.autograd.gradcheck(layer, inputs)


def test_precision_where_the_mean_is_large():
    x = torch.randn(2, 16, 12, 12) + 1000
    weight = torch.randn(8, 16, 3, 3)
    y = kn_conv(x, weight, padding=1, dropout_p=0.0)
    exact = kn_conv(x.double(), weight.double(), padding=1, dropout_p=0.0)
    assert (y - exact).abs().max() < 1e-3 * exact.abs().max()


def test_inputs_of_all_sizes_share_the_loops(monkeypatch: pytest.MonkeyPatch):
    geometry = GEOMETRIES["same size"]
    check_statistics(geometry, "rows", drop=True)
    monkeypatch.setattr(rows_compiled, "compile_for_all_sizes", None)
    check_statistics(geometry, "rows", drop=True)


def test_compiling_leaves_the_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    rows_compiled._window_statistics.__wrapped__(
        "rows", False, 0, torch.float32, True, 0.3, GEOMETRIES["a pixel"], 1e-5, torch.float32
    )
    assert torch.equal(torch.rand(1), expected)


def test_threads_that_compile_at_once(caplog):
    geometry, results = Geometry((1, 2), (1, 1), (0, 0), (1, 1)), []

    def compile_and_run() -> None:
        x, weight = torch.ones(2, 3, 4, 5), torch.ones(1, 3, 1, 2)
        arguments = x, weight, None, 0.0, geometry, 1e-5, x.dtype
        results.append(rows_compiled.window_statistics(*arguments)[0])

    threads = [threading.Thread(target=compile_and_run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [mean.eq(1).all().item() for mean in results] == [True] * 3
    assert "compiling failed" not in caplog.text


def test_who_uses_it():
    x = torch.randn(2, 4, 8, 8)
    assert primitives_for(x).epilogue is rows_compiled.epilogue
    assert primitives_for(x.bfloat16()) is DIFFERENTIABLE
    assert primitives_for(x.to("meta")) is DIFFERENTIABLE
    seen = []
    torch.func.vmap(lambda t: seen.append(primitives_for(t)) or t)(x)
    assert seen == [DIFFERENTIABLE]


def test_without_a_compiler_there_is_another_way(monkeypatch: pytest.MonkeyPatch, caplog):
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(rows_compiled, "compile_for_all_sizes", broken)
    for primitive in ("_window_statistics", "_epilogue", "_output_gradient", "_through_statistics"):
        uncached = getattr(rows_compiled, primitive).__wrapped__
        monkeypatch.setattr(rows_compiled, primitive, uncached)
    check_statistics(GEOMETRIES["same size"], "rows", drop=True)
    test_epilogue_and_output_gradient("rows", relu=True, with_bias=True)
    assert caplog.text.count("no compiler") == 1


def test_the_largest_windows_are_not_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows_compiled, "compile_for_all_sizes", None)
    check_statistics(Geometry((9, 8), (1, 1), (0, 0), (1, 1)), "rows", drop=True)


def test_flops_are_counted():
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        kn_conv(x, weight, padding=1).sum().backward()
    assert counter.get_total_flops() >= 2 * 2 * 2 * 64 * 6 * 4 * 9
