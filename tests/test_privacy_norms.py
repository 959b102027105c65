"""Norms with statistics of batches or of images, which no way of private training covers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("opacus")


from kernelnorm.norms import NORMS, describe
from tests.bookkeeping import images, private

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


OF_BATCHES = {name for name in NORMS if describe(name).group == "batch-dependent"}


MODES = pytest.mark.parametrize("mode", ["bookkeeping", "hooks", "ghost"])


@MODES
@pytest.mark.parametrize("norm", sorted(OF_BATCHES - {"batch"}))  # PyTorch's has other tests below
def test_statistics_of_batches_are_refused_also_where_nothing_is_trained(
    norm: str, mode: str
) -> None:
    layer = describe(norm).layer(32).requires_grad_(False)
    with pytest.raises(NotImplementedError, match=r"'1' is a .* takes statistics of batches"):
        private(nn.Sequential(nn.Conv2d(3, 32, 3), layer), images(2), grad_sample_mode=mode)


class OwnBatchNorm(nn.Module):
    """A batch norm that is not derived from PyTorch's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.track_running_stats = True
        self.register_buffer("running_mean", torch.zeros(channels))


@MODES
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4).requires_grad_(False),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.LazyBatchNorm2d(affine=False),
        OwnBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.LazyInstanceNorm2d(affine=False),
    ],
)
def test_statistics_of_images_are_refused(norm: nn.Module, mode: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    with pytest.raises(RuntimeError, match=r"'1' is a .*Norm.* that takes statistics of the"):
        private(network, images(2), grad_sample_mode=mode)
    assert "forward" not in vars(network[0])


def test_frozen_batch_norm_is_checked_in_each_step() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).requires_grad_(False).eval())
    wrapped, optimizer, _ = private(network, images(2))
    x = images(2, dtype=torch.float32)
    wrapped(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    wrapped.train()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(RuntimeError, match=r"'1' is a BatchNorm2d .* call eval\(\)"):
            wrapped(x)


def test_instance_norm_without_running_statistics_is_taken() -> None:
    private(nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), images(2))
