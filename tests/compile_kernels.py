"""Compiles all Triton kernels for a GPU that need not be there; prints a line for each.

    python -m tests.compile_kernels 90 float32 bfloat16

The launches run up to where a GPU would be asked: what they give to Triton is what a GPU would get.
A line has the kernel, its dtype, the layout of its tensors, whether it has a mask, the bits of its
widest load from global memory, its registers and its bytes of stack for each thread.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernelnorm.ops.backends import Statistics
from kernelnorm.ops.backends import triton as backend
from kernelnorm.ops.mask import draw_keys
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry

SHAPE = N, C, H, W = 4, 128, 16, 16
LAYOUTS = {
    "planes": lambda x: x.contiguous(),
    "rows": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slices": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :C],
}


class Absent:
    """A driver for a GPU of this architecture, to compile with."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_all(dtype: torch.dtype, lay: Callable[[Tensor], Tensor], masked: bool) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    x, y, grad = (lay(torch.ones(SHAPE, dtype=dtype)) for _ in range(3))
    one, vector = torch.ones(N, 1, H, W, dtype=wide), torch.ones(C, dtype=wide)
    pair, keys = torch.ones(N, 2, H, W, dtype=wide), draw_keys(SHAPE, x.device) if masked else None
    settings = Settings(Geometry((3, 3), (1, 1), (1, 1), (1, 1)), 1, 0.1, masked, 1e-5, None)
    backend.window_statistics(x, keys, settings, with_means=False)
    backend.statistics_backward(grad, x, pair, keys, settings)
    if masked:
        return  # the others know of no mask
    for bias, slope in ((vector, None), (None, 0.0), (vector, 0.0), (vector, 0.2)):
        for terms in (1, 2):
            backend.epilogue(y, [(one, vector)] * terms, one, bias, slope)
        backend.epilogue_backward(grad, y, Statistics(one, one), vector, bias, slope, (1.0, 1.0))


def describe(kernel: Any) -> tuple[int, ...]:
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    widest = max(int(count or 1) * int(bits) for count, bits in loads)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return widest, int(registers), int(stack)


def main() -> None:
    driver.set_active(Absent(int(sys.argv[1])))
    compiled = []

    def compile_only(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: compiled.append(
            kernel.warmup(*arguments, grid=grid, **options)
        )

    with mock.patch.object(triton.runtime.JITFunction, "__getitem__", compile_only):
        for name, layout, masked in product(sys.argv[2:], LAYOUTS, (False, True)):
            launch_all(getattr(torch, name), LAYOUTS[layout], masked)
            for kernel in compiled:
                print(kernel.metadata.name, name, layout, masked, *describe(kernel))
            compiled.clear()


if __name__ == "__main__":
    main()
