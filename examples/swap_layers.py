"""Swap convolution + BatchNorm for KNConv in a network of your own, keeping its weights."""

import torch
from torch import nn

from kernelnorm import KNConv2d


def swap(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Conv2d:
            layer = KNConv2d(
                child.in_channels, child.out_channels, child.kernel_size, child.stride,
                child.padding, child.dilation, child.groups, padding_mode=child.padding_mode,
                device=child.weight.device, dtype=child.weight.dtype,
            )  # fmt: skip
            layer.load_state_dict(child.state_dict(), strict=False)  # it may have had no bias
            setattr(module, name, layer.train(child.training))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            swap(child)


network = nn.Sequential(
    nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
    ),
    nn.Sequential(
        nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
    ),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
)
swap(network)
print(network)
scores = network(torch.randn(1, 3, 32, 32))  # a single image a batch will do
scores.sum().backward()
print(scores.shape)
