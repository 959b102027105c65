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

from kernelnorm.ops.regions import compile_for_all_sizes, once

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
