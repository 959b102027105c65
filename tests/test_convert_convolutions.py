"""``convert``, rule I: which convolutions become KNConvs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import kernelnorm
from kernelnorm import KernelNorm1d, KernelNorm2d, KernelNorm3d, KNConv1d, KNConv2d, KNConv3d
from tests.converting import IMAGE, Calling, conv_norm_relu, convert, why


def test_depthwise_convolutions_become_knconvs():
    model = nn.Sequential(conv_norm_relu(3, 8), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    network, _ = convert(model)
    assert isinstance(network[1], KNConv2d)
    assert network[1].groups == 8


def test_gates_and_classifiers_stay():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        gate = torch.sigmoid(self.expand(F.relu(self.squeeze(self.pool(y)))))
        return self.classifier(self.pool(y * gate)).flatten(1)

    model = Calling(
        forward, conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), relu=nn.ReLU(),
        squeeze=nn.Conv2d(8, 2, 1), expand=nn.Conv2d(2, 8, 1), classifier=nn.Conv2d(8, 5, 1),
        pool=nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    network, report = convert(model)
    for name in ("squeeze", "expand", "classifier"):
        assert type(getattr(network, name)) is nn.Conv2d
        assert why(report, name) == "no norm before or after it"
    assert not report.unconverted


def test_norm_of_a_transposed_convolution_becomes_a_kernel_norm():
    model = nn.Sequential(conv_norm_relu(3, 8), nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8))
    network, report = convert(model)
    assert type(network[1]) is nn.ConvTranspose2d
    assert isinstance(network[2], KernelNorm2d)
    assert network[2].kernel_size == (1, 1)
    assert not report.unconverted


def test_convolution_of_tiny_windows_stays():
    network, report = convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    assert type(network[0]) is nn.Conv2d
    assert isinstance(network[1], KernelNorm2d)
    assert why(report, "0") == "its windows have 3 elements"


class WeightStandardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def parametrized() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3)
    parametrize.register_parametrization(conv, "weight", nn.Identity())
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (lambda: WeightStandardized(8, 8, 3), "WeightStandardized has a forward of its own"),
        (parametrized, "ParametrizedConv2d is parametrised"),
    ],
)
def test_unknown_convolutions_are_named(conv: Callable[[], nn.Module], reason: str):
    model = nn.Sequential(conv_norm_relu(3, 8), conv(), nn.BatchNorm2d(8), nn.ReLU())
    network, report = convert(model)
    assert [(row.name, row.why) for row in report.unconverted] == [("1", reason)]
    assert isinstance(network[2], KernelNorm2d)
    assert isinstance(network[3], nn.ReLU)


class ReLUNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_unknown_norms_are_named_and_left_with_their_convolution():
    network, report = convert(nn.Sequential(conv_norm_relu(3, 8), nn.Conv2d(8, 8, 3), ReLUNorm(8)))
    assert type(network[1]) is nn.Conv2d
    assert isinstance(network[2], ReLUNorm)
    assert report.unconverted[0].why == "ReLUNorm has a forward of its own"


def test_forward_of_an_instance_is_an_obstacle():
    model = conv_norm_relu(3, 8)
    model[0].forward = lambda x: F.conv2d(x, model[0].weight, padding=1)
    _, report = convert(model, inplace=True)
    assert report.unconverted[0].why == "this Conv2d has a forward of its own"


class Conv2dSame(nn.Conv2d):
    """Padded like TensorFlow's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [0, 1, 0, 1]), self.weight, self.bias, self.stride)


def test_conv2d_same_becomes_a_knconv_with_the_same_padding():
    network, _ = convert(nn.Sequential(Conv2dSame(3, 8, 3, stride=2), nn.BatchNorm2d(8)))
    plain = KNConv2d(3, 8, 3, stride=2)
    plain.load_state_dict(network[0].state_dict())
    expected = plain.eval()(F.pad(IMAGE, [0, 1, 0, 1]))
    torch.testing.assert_close(network.eval()(IMAGE), expected)


@pytest.mark.parametrize(
    ("d", "kn_conv", "kernel_norm"),
    [(1, KNConv1d, KernelNorm1d), (2, KNConv2d, KernelNorm2d), (3, KNConv3d, KernelNorm3d)],
)
def test_sequences_images_and_volumes(d: int, kn_conv: Any, kernel_norm: Any):
    conv, norm = getattr(nn, f"Conv{d}d"), getattr(nn, f"BatchNorm{d}d")
    x = torch.randn(2, 4, *[9, 8, 7][:d])
    model = nn.Sequential(norm(4), nn.Tanh(), nn.Tanh(), conv(4, 8, 3), norm(8), nn.ReLU())
    for example in (x, None):
        network, report = convert(model, example)
        assert isinstance(network[3], kn_conv)
        assert not report.unconverted
        network(x).sum().backward()
    lonely, _ = kernelnorm.convert(nn.Sequential(norm(4)), x)
    assert isinstance(lonely[0], kernel_norm)
