"""``convert``, rules II and IV: what becomes of norms, and the KernelNorm before the pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import kernelnorm
from kernelnorm import KernelNorm2d, KNConv2d
from tests.converting import IMAGE, Block, Calling, PreActivation, conv_norm_relu, convert


class FrozenBatchNorm2d(nn.Module):
    """Shaped like torchvision's: buffers, and no number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class BatchNormAct2d(nn.BatchNorm2d):
    """Shaped like timm's: a norm that has its activation and its dropout inside."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


@pytest.mark.parametrize("x", [IMAGE, None])
def test_frozen_batch_norm_goes(x: Tensor | None):
    network, _ = convert(nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU()), x)
    assert [type(layer) for layer in network] == [KNConv2d, nn.Identity, nn.Identity]
    assert not [*network.buffers()]


def test_activation_inside_of_a_norm_is_kept():
    network, report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, nn.SiLU())))
    assert isinstance(network[1].act, nn.SiLU)
    assert next(row.after for row in report.rows if row.name == "1") == "SiLU"
    y = network[0].eval()(IMAGE)
    torch.testing.assert_close(network.eval()(IMAGE), F.silu(y))


def test_relu_inside_of_a_norm_is_fused():
    network, report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, nn.ReLU())))
    assert network[0].activation == "relu"
    assert [row.after for row in report.rows] == ["KNConv2d", "removed", "removed"]


def test_activation_of_a_norm_that_becomes_a_kernel_norm_is_kept():
    network, _ = convert(nn.Sequential(nn.ConvTranspose2d(3, 8, 3), BatchNormAct2d(8, nn.ReLU())))
    assert [type(layer) for layer in network[1]] == [KernelNorm2d, nn.Identity, nn.ReLU]


def test_norms_that_are_functions_are_unconverted():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.layers(x)
        for _ in range(2):
            y = F.batch_norm(y, None, None, training=True)
        return F.instance_norm(y)

    model = nn.Sequential(Calling(forward, layers=conv_norm_relu(3, 8)))
    _, report = convert(model)
    (row,) = report.unconverted
    assert (row.name, row.before, row.after) == ("0", "batch_norm()", "batch_norm()")
    assert "1 unconverted" in str(report)


def test_layers_that_a_norm_only_holds_are_not_called():
    class Probed(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.probe = nn.Dropout(1.0)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Probed(8), nn.ReLU())
    network, _ = kernelnorm.convert(model, IMAGE)
    assert isinstance(network[1], nn.Identity)
    assert network.train()(IMAGE).any()


@pytest.mark.parametrize("kind", ["parametrised", "pruned", "weight norm"])
def test_norms_that_compute_their_weight_stay(kind: str):
    norm = nn.BatchNorm2d(8)
    if kind == "parametrised":
        parametrize.register_parametrization(norm, "weight", nn.Softplus())
    elif kind == "pruned":
        prune.l1_unstructured(norm, "weight", 2)
    else:
        with pytest.warns(FutureWarning, match="weight_norm` is deprecated"):
            nn.utils.weight_norm(norm)
    network, report = kernelnorm.convert(
        nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
        IMAGE,
        inplace=True,
    )
    assert [row.name for row in report.unconverted] == ["1"]
    assert "computes its parameters" in report.unconverted[0].why
    network(IMAGE)


def test_norm_with_a_layer_called_norm():
    class Named(BatchNormAct2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, nn.SiLU())
            self.norm = nn.Identity()

    network, _ = convert(nn.Sequential(nn.Conv2d(3, 8, 3), Named(8)))
    assert isinstance(network[0], KNConv2d)


@pytest.mark.parametrize("example", [IMAGE, None])
def test_norm_without_windows_is_left_and_named(example: Tensor | None):
    model = nn.Sequential(
        conv_norm_relu(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8),
        nn.BatchNorm1d(8),
    )  # fmt: skip
    network, report = kernelnorm.convert(model, example)
    assert isinstance(network[4], nn.BatchNorm1d)
    assert [row.name for row in report.unconverted] == ["4"]
    assert "no windows" in report.unconverted[0].why


@pytest.mark.parametrize(
    ("norm", "name"), [(nn.GroupNorm(2, 8), "group"), (nn.InstanceNorm2d(8), "instance")]
)
def test_other_norms_are_converted_on_request(norm: nn.Module, name: str):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU())
    network, _ = convert(model, norms=[name])
    assert isinstance(network[0], KNConv2d)
    with pytest.raises(ValueError, match=f"It has '{name}': name these in norms"):
        kernelnorm.convert(model, IMAGE)


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 8), lambda: nn.SyncBatchNorm(8)])
@pytest.mark.parametrize("where", ["in order", "elsewhere"])
def test_dimensions_are_those_of_the_convolutions(
    d: int, norm: Callable[[], nn.Module], where: str
):
    """A KernelNorm of more dimensions would take a batch as one map, and mix its samples."""
    convolution = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1](3, 8, 2, 2)
    model = nn.Sequential(convolution, norm(), nn.ReLU())
    if where == "elsewhere":
        model = nn.Sequential(nn.Sequential(convolution), nn.Sequential(norm()))
    network, _ = kernelnorm.convert(model, norms=["batch", "group"])
    names = {type(module).__name__ for module in network.modules()}
    assert f"KernelNorm{d}d" in names
    x = torch.randn(4, 3, *[6] * d)
    torch.testing.assert_close(network.eval()(x)[:1], network(x[:1]))


def test_dimensions_that_nothing_tells_need_an_example():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU())
    with pytest.raises(ValueError, match="dimensions of the input of '0', a GroupNorm: pass examp"):
        kernelnorm.convert(model, norms=["group"])
    network, _ = kernelnorm.convert(model, torch.randn(2, 8, 5), norms=["group"])
    assert isinstance(network[0], kernelnorm.KernelNorm1d)


def test_pooled_sum_gets_a_kernel_norm():
    model = nn.Sequential(conv_norm_relu(3, 8), Block(), nn.AdaptiveAvgPool2d(1))
    network, _ = convert(model)
    assert [type(layer) for layer in network[2]] == [KernelNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d]
    assert network[2][0].dropout_p == 0.2
    assert network[1].conv2.activation is None


def test_other_outputs_do_not_change_the_kernel_norm_before_the_pooling():
    def forward(self: Any, x: Tensor) -> Any:
        early = self.stem(x)
        late = self.block(early)
        return {"logits": self.classifier(self.pool(late).flatten(1)), "early": early}

    layers = {"stem": conv_norm_relu(3, 8), "block": Block(), "pool": nn.AdaptiveAvgPool2d(1)}
    layers["classifier"] = nn.Linear(8, 2)
    network, _ = kernelnorm.convert(Calling(forward, **layers), IMAGE)
    assert any(isinstance(layer, KernelNorm2d) for layer in network.modules())


def test_pooled_preactivation_norm_becomes_the_kernel_norm():
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.features(x))).mean([2, 3])

    features = nn.Sequential(conv_norm_relu(3, 8), PreActivation())
    network, _ = convert(Calling(forward, features=features, norm=nn.BatchNorm2d(8)))
    assert isinstance(network.norm, KernelNorm2d)
    assert network.norm.dropout_p == 0.2


def test_pooled_knconv_with_its_relu_gets_none():
    model = nn.Sequential(conv_norm_relu(3, 8), nn.AdaptiveAvgPool2d(1))
    network, _ = convert(model)
    assert isinstance(network[1], nn.AdaptiveAvgPool2d)


def test_pooled_knconv_with_another_activation_gets_a_kernel_norm_before_that():
    model = nn.Sequential(conv_norm_relu(3, 8), nn.AdaptiveAvgPool2d(1))
    model[0][2] = nn.Hardswish()
    network, _ = convert(model)
    assert [type(layer) for layer in network[0][2]] == [KernelNorm2d, nn.Hardswish]
