"""The rivals beside timm's, where timm has them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm.layers as theirs
import torch
from timm.models.nfnet import NormFreeBlock
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from kernelnorm.models import create_model
from kernelnorm.norms import (
    EvoNorm2dS0,
    FilterResponseNorm2d,
    ScaledReLU,
    ScaledWSConv2d,
    WSConv2d,
    adaptive_clip_grad_,
)

PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "EvoNorm-S0": (
        lambda: EvoNorm2dS0(12, group_size=3),
        lambda: theirs.EvoNorm2dS0(12, group_size=3),
    ),
    "EvoNorm-S0 without activation": (
        lambda: EvoNorm2dS0(12, 3, activation=False),
        lambda: theirs.EvoNorm2dS0(12, group_size=3, apply_act=False),
    ),
    "FRN + TLU": (
        lambda: FilterResponseNorm2d(12, eps=1e-5),
        lambda: theirs.FilterResponseNormTlu2d(12),
    ),
    "FRN": (
        lambda: FilterResponseNorm2d(12, activation=False, eps=1e-5),
        lambda: theirs.FilterResponseNormTlu2d(12, apply_act=False),
    ),
    "Weight Standardization": (
        lambda: WSConv2d(12, 8, 3, 2, 1, groups=2),
        lambda: theirs.StdConv2d(12, 8, 3, 2, 1, groups=2, bias=True, eps=1e-5),
    ),
    "Scaled Weight Standardization": (
        lambda: ScaledWSConv2d(12, 8, 3, 2, 1, groups=2),
        lambda: theirs.ScaledStdConv2d(12, 8, 3, 2, 1, groups=2, eps=1e-15),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_values_and_gradients_are_timms(pair: str) -> None:
    our, their = (make().double() for make in PAIRS[pair])
    for parameter in our.parameters():
        nn.init.normal_(parameter)
    their.load_state_dict(our.state_dict())
    x = torch.randn(2, 12, 7, 6, dtype=torch.float64, requires_grad=True)
    y, expected = our(x), their(x)
    if "Weight" in pair:
        tolerance = {"rtol": 1e-9, "atol": 1e-11}
    else:  # timm's statistics are float32
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y, expected, **tolerance)
    toward = torch.randn_like(y)
    grads = torch.autograd.grad((y * toward).sum(), [x, *our.parameters()])
    wanted = torch.autograd.grad((expected * toward).sum(), [x, *their.parameters()])
    for name, grad in zip(["x", *dict(our.named_parameters())], grads, strict=True):
        index = ["x", *dict(their.named_parameters())].index(name)
        torch.testing.assert_close(grad, wanted[index], **tolerance)


@pytest.mark.parametrize("clip_factor", [1e-4, 0.01, 1.0])
def test_clipped_gradients_are_timms(clip_factor: float) -> None:
    """But for gains, of shape ``(c, 1, 1, 1)``, which the authors and we clip as one vector."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    network(torch.randn(2, 3, 4, 4)).square().sum().backward()
    other = copy.deepcopy(network)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        b.grad = a.grad.clone()
    adaptive_clip_grad_(network.parameters(), clip_factor)
    adaptive_clip_grad(other.parameters(), clip_factor)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_normalizer_free_blocks_are_timms(index: int) -> None:
    """Blocks of ResNet-50's second stage, whose shortcut timm pools for: stride 1 in its place."""
    network = create_model("resnet50", norm="nf")
    block = network.layer2[index]
    if index == 0:
        block.conv2.stride = block.downsample[0].stride = (1, 1)
    variance = 1 + 3 * 0.2**2 if index == 0 else 1 + index * 0.2**2
    their = NormFreeBlock(
        block.conv1.in_channels,
        512,
        alpha=0.2,
        beta=variance**-0.5,
        reg=False,
        act_layer=Activation,
        conv_layer=theirs.ScaledStdConv2d,
    )
    names = ["conv1", "conv2", "conv3"]
    pairs = [(getattr(block, name), getattr(their, name)) for name in names]
    pairs += [(block.downsample[0], their.downsample.conv)] if index == 0 else []
    for our_conv, their_conv in pairs:
        nn.init.normal_(our_conv.weight)
        their_conv.load_state_dict(our_conv.state_dict())
    x = torch.randn(2, block.conv1.in_channels, 5, 5)
    torch.testing.assert_close(block(x), their(x), rtol=1e-4, atol=1e-4)


class Activation(ScaledReLU):
    """With the argument that timm gives."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)
