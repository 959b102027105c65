"""The memory that a kernel network keeps for its backward, against its BatchNorm twin."""

from __future__ import annotations

import pytest
import torch

from kernelnorm.experiments.bench import saved_bytes
from kernelnorm.models import create_model


@pytest.mark.parametrize(
    ("name", "size", "most"),
    [("vgg8", 32, 0.65), ("resnet18", 64, 0.75), ("densenet121", 64, 0.26)],
)
def test_kernel_network_keeps_less(name: str, size: int, most: float):
    x = torch.rand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    batch, kernel = (
        saved_bytes(create_model(name, norm=norm).to(memory_format=torch.channels_last), x)
        for norm in ("batch", "kernel")
    )
    assert kernel <= most * batch


@pytest.mark.slow
def test_compiled_kernel_network_keeps_less():
    """A compiler keeps the concatenations of a DenseNet, too: it sees no parts."""
    x = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    network = create_model("densenet121").to(memory_format=torch.channels_last)
    batch = create_model("densenet121", norm="batch").to(memory_format=torch.channels_last)
    compiled = torch.compile(network, backend="aot_eager")
    assert saved_bytes(compiled, x) <= 0.56 * saved_bytes(batch, x)


def test_what_is_counted():
    """Of a linear layer: its input, not its weight."""
    assert saved_bytes(torch.nn.Linear(8, 4), torch.rand(16, 8)) == 16 * 8 * 4
