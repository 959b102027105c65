"""Small networks, and what tests compare of two runs of one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import kernelnorm as kn
from kernelnorm.models.densenet import DenseNet


def conv_and_norm() -> nn.Sequential:
    """One of each, with everything on that could be in the way."""
    torch.manual_seed(0)
    return nn.Sequential(
        kn.KNConv2d(4, 8, 3, stride=2, padding=1, groups=2, activation="relu"),
        kn.KernelNorm2d(2, stride=1),
        kn.KNConv2d(8, 6, 3, padding="same", padding_mode="reflect"),
        kn.KernelNorm2d(1),
    )


def small_densenet(norm: str = "kernel") -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(8, (2, 2, 1, 1), 16, norm, 4, 3, True, None)


def layers_and_a_block() -> nn.Sequential:
    """Layers with a stride, and a dense block."""
    torch.manual_seed(0)
    block = small_densenet().features.denseblock1
    return nn.Sequential(kn.KNConv2d(4, 16, 3, stride=2, padding=1, activation="relu"), block)


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


def operators_of(module: torch.fx.GraphModule) -> set[str]:
    """The names of this library's operators that a graph calls."""
    targets = [
        str(node.target)
        for part in module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
    ]
    return {target.split(".")[1] for target in targets if target.startswith("kernelnorm.")}
