"""A small network, and what tests compare of two runs of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import kernelnorm as kn


def conv_and_norm() -> nn.Sequential:
    """One of each, with everything on that could be in the way."""
    torch.manual_seed(0)
    return nn.Sequential(
        kn.KNConv2d(4, 8, 3, stride=2, padding=1, groups=2, activation="relu"),
        kn.KernelNorm2d(2, stride=1),
        kn.KNConv2d(8, 6, 3, padding="same", padding_mode="reflect"),
        kn.KernelNorm2d(1),
    )


def images(*shape: int) -> Tensor:
    """An input of :func:`conv_and_norm`, always the same."""
    return torch.randn(*shape or (3, 4, 9, 8), generator=torch.Generator().manual_seed(0))


def run(
    module: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], seed: int = 7
) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def assert_all_close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
