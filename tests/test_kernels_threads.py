"""The threads of the C kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernelnorm.ops import passes
from kernelnorm.ops.backends import cpu
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry
from tests.strategies import Case

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
        y, _, *small = passes.forward(x, weight, bias, keys, options, cpu)
        grad = case.gradient(y)
        assert y.numel() > 4 * cpu._ELEMENTS_PER_THREAD
        saved = [y, *small]
        gradients = passes.backward(grad, x, weight, bias, keys, saved, options, [True] * 3)
        runs.append([*saved, *gradients])
    for first, second, alone in zip(*runs, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)
