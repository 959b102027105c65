"""The C kernels and the Triton kernels, each against PyTorch operations in float64.

Without a GPU the Triton kernels run in Triton's interpreter, with few examples since it is slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kernelnorm.ops import passes, pixel_norm
from kernelnorm.ops.backends import Backend, Statistics, compute_dtype, cpu, eager, triton
from kernelnorm.ops.settings import Settings, constants
from tests.strategies import Case, laid_out


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
BACKENDS = {"cpu": cpu, "triton": triton}
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
        self.device, self.backend = device, BACKENDS[self.name]
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


@contextmanager
def on_backend(backend: Backend) -> Iterator[None]:
    """Layers run on a backend if it supports their inputs."""

    def select(x: Tensor) -> Backend:
        return backend if backend.supports(x) else eager

    with ExitStack() as stack:
        for module in (passes, pixel_norm):
            stack.enter_context(mock.patch.object(module, "backend_for", select))
        yield


def forget() -> None:
    """Empties the caches of what follows from the numbers that :meth:`Subject.running` changes."""
    for module in BACKENDS.values():
        for name, value in vars(module).items():
            if name.startswith("_") and hasattr(value, "cache_clear") and name != "_works":
                value.cache_clear()


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


class Random:
    """Random tensors of a device, the same for the same seed."""

    def __init__(self, backend: Subject, seed: int) -> None:
        self.device, self.generator = backend.device, torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.device, dtype)


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
        result = passes.forward(*inputs, keys, options)
    expected = passes.forward(*double(inputs), keys, options, eager)
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
        results = passes.backward(grad, *inputs, keys, saved, options, needs)
    assert torch.equal(grad, before)
    with on_backend(eager):
        exact = passes.backward(grad.double(), *double(inputs), keys, double(saved), options, needs)
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
