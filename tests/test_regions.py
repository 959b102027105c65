"""Compiled functions: what they return, and that PyTorch keeps them on disk."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config

from kernelnorm.ops import regions
from kernelnorm.ops.mask import draw_keys, keep, spread_keys
from kernelnorm.ops.regions import compile_for_all_sizes, in_halves, once

if shutil.which("c++") is None and sys.platform == "linux":
    pytest.skip("no C++ compiler", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own parts


@config.patch(fx_graph_cache=True, force_disable_caches=False)
def test_what_was_compiled_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = once(x * 3)
        return y.sum(1), y - y.sum()

    before = counters["inductor"].copy()
    for _ in range(2):
        compiled = compile_for_all_sizes(function, [torch.empty(13, 17)])
        for shape in ((3, 5), (1, 40)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled([x])[:2], function(x))
    gained = counters["inductor"] - before
    assert (gained["fxgraph_cache_miss"], gained["fxgraph_cache_hit"]) == (1, 1)


@pytest.mark.parametrize("slow", [False, True])
def test_integers_are_the_same_in_halves(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_integers_load_slowly", lambda: slow)
    compiled = compile_for_all_sizes(lambda x: (in_halves(x) * 3,), [integers(17)])
    for size in (1, 8, 1003):
        x = integers(size)
        result, *kept = compiled([x])
        assert torch.equal(result, x * 3)
        assert [k.dtype for k in kept] == [torch.float32] * 2 * slow


def integers(size: int) -> Tensor:
    x = torch.randint(-(1 << 31), 1 << 31, (size,), dtype=torch.int32)
    limits = torch.tensor([-(1 << 31), (1 << 31) - 1, -1, 0, 0xFFFF, 0x10000], dtype=torch.int32)
    return torch.cat([x, limits])


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_masks_are_the_same_in_halves(
    slow: bool, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_integers_load_slowly", lambda: slow)

    def function(x: Tensor, keys: Tensor) -> tuple[Tensor]:
        return (x * keep(spread_keys(keys, x.shape, 0.3), x.dtype),)

    def arguments(*shape: int) -> list[Tensor]:
        x = torch.randn(shape).contiguous(memory_format=memory_format)
        return [x, draw_keys(shape, x.device)]

    compiled = compile_for_all_sizes(function, arguments(13, 67, 29, 31))
    for shape in ((3, 70, 5, 9), (2, 9, 16, 40)):
        inputs = arguments(*shape)
        assert torch.equal(compiled([*inputs])[0], function(*inputs)[0])
