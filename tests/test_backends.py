"""Which backend a tensor gets."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn

from kernelnorm.ops.backends import backend_for, eager, triton
from tests.oracle import DTYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_what_is_supported(backend):
    dtypes = DTYPES[backend.name]
    x = torch.ones(2, 3, 4, 4, dtype=dtypes[0], device=backend.device)
    for dtype in dtypes:
        assert backend.supports(x.to(dtype))
    assert backend.supports(nn.Parameter(x))
    assert not backend.supports(x.long())
    assert not backend.supports(x[:0])
    assert not backend.supports(x.to("meta"))


def test_others_run_in_pytorch_operations(device):
    x = torch.ones(2, 3, 4, 4)
    for other in (x.to("meta"), x.half(), x[:0], x.to(torch.float8_e4m3fn)):
        assert backend_for(other) is eager


def test_pytorch_operations_take_over_where_triton_fails(backend, monkeypatch, caplog):
    if backend.name != "triton":
        pytest.skip("Triton compiles in use")
    triton._works.cache_clear()
    monkeypatch.setattr(triton, "_launch", mock.Mock(side_effect=RuntimeError("no compiler")))
    for _ in range(2):
        assert not triton.supports(torch.ones(2, 3, 4, 4, device=backend.device))
    assert caplog.text.count("no compiler") == 1
    triton._works.cache_clear()


@pytest.mark.slow
def test_imports_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from kernelnorm.ops.backends import triton; assert not triton.supports(torch.ones(1, 1))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
