"""Convert a network of your own, keeping its weights, and train it on one image at a time."""

import torch
from torch import Tensor, nn

import kernelnorm


class Block(nn.Module):
    """A residual block of two convolutions, written as in torchvision."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the same shape."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
    Block(16), Block(16),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
)  # fmt: skip
network, report = kernelnorm.convert(model, torch.randn(1, 3, 32, 32))
print(report)

optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
loss = network(torch.randn(1, 3, 32, 32)).square().mean()  # a single image
loss.backward()
optimizer.step()
