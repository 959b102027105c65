"""The heap: what it costs to have a large tensor once more."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
import torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(10_000_000) for _ in range(3)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = min(faults() for _ in range(8))
{}
after = min(faults() for _ in range(8))
print(before, after)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_freed_memory_is_kept() -> None:
    keeping = "from kernelnorm.experiments.heap import keep_freed_memory; keep_freed_memory()"
    code = [sys.executable, "-c", _FAULTS.format(keeping)]
    output = subprocess.run(code, check=True, capture_output=True, text=True).stdout
    before, after = map(int, output.split())
    assert after < before / 10
