"""Triton's compiler takes the kernels, for GPUs that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from kernelnorm.ops.backends import triton


@pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
def test_a_compiler_that_asks_first_does_not_turn_the_kernels_off(tracing_mode: str):
    if not torch.cuda.is_available() and not triton.INTERPRETED:
        pytest.skip("nothing runs the kernels")
    x = torch.ones(2, 3, device="cuda" if torch.cuda.is_available() else "cpu")
    triton._works.cache_clear()
    asked = []
    make_fx(lambda x: asked.append(triton.supports(x)) or x + 1, tracing_mode=tracing_mode)(x)
    assert asked == [True]
    assert triton.supports(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtypes"), [(80, ["float16", "float64"]), (90, ["float32", "bfloat16"])]
)
def test_the_kernels_compile_for_gpus(architecture: int, dtypes: list[str], tmp_path: Path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.compile_kernels", str(architecture), *dtypes]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    with_mask = {"pixel_statistics", "window_statistics", "statistics_backward"}
    assert {tuple(line[:4]) for line in lines} == {
        (kernel, dtype, layout, str(masked))
        for kernel, dtype, layout in product(
            {"epilogue", "epilogue_backward", *with_mask},
            dtypes,
            ("planes", "rows", "slices"),
        )
        for masked in (False, *[True] * (kernel in with_mask))
    }
    for *name, widest, _, stack in lines:
        if name[0] != "window_statistics":  # which gathers from maps of one channel
            assert widest == "128", name  # bits, the most that there are
        assert int(stack) < 64, name  # bytes: registers suffice, or nearly
