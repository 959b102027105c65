"""Compiled functions: what they return, and that PyTorch keeps them on disk."""

from __future__ import annotations

import random
import shutil
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kernelnorm.ops.regions import compile_for_all_sizes, once

if shutil.which("c++") is None and sys.platform == "linux":
    pytest.skip("no C++ compiler", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own parts


def test_what_was_compiled_is_kept_on_disk() -> None:
    factor = random.random()  # nobody has compiled it before

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = once(x * factor)
        return y.sum(1), y - y.sum()

    before = counters["inductor"].copy()
    for _ in range(2):
        compiled = compile_for_all_sizes(function, [torch.empty(13, 17)])
        for shape in ((3, 5), (1, 40)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled([x])[:2], function(x))
    gained = counters["inductor"] - before
    assert (gained["fxgraph_cache_miss"], gained["fxgraph_cache_hit"]) == (1, 1)
