"""The modules: habits of torch.nn, and one call to their functional twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kernelnorm as kn
from kernelnorm import functional

CONVS = [
    (kn.KNConv1d, nn.Conv1d, (5,)),
    (kn.KNConv2d, nn.Conv2d, (5, 6)),
    (kn.KNConv3d, nn.Conv3d, (5, 6, 4)),
]
NORMS = [(kn.KernelNorm1d, (5,)), (kn.KernelNorm2d, (5, 6)), (kn.KernelNorm3d, (5, 6, 4))]


@pytest.mark.parametrize(("cls", "conv", "sizes"), CONVS)
@pytest.mark.parametrize("training", [True, False])
def test_kn_conv_is_one_call_to_the_function(cls, conv, sizes, training):
    layer = cls(
        4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="replicate",
        dropout_p=0.3, eps=1e-3, activation="relu", evaluation="plain",
    ).train(training)  # fmt: skip
    x = torch.randn(2, 4, *sizes)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    expected = functional.kn_conv(
        x, layer.weight, layer.bias, 2, 2, 2, 2, padding_mode="replicate", dropout_p=0.3,
        training=training, eps=1e-3, activation="relu", evaluation="plain",
    )  # fmt: skip
    assert torch.equal(y, expected)
    assert y.shape == conv(4, 6, 3, 2, 2, 2, 2)(x).shape


@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.1), nn.LeakyReLU(1e-9), nn.LeakyReLU(-1), nn.Mish(), nn.PReLU()]
)
def test_any_module_is_an_activation(activation):
    layer = kn.KNConv2d(3, 4, 3, dropout_p=0, activation=activation)
    x = torch.randn(2, 3, 5, 6)
    expected = functional.kn_conv(x, layer.weight, layer.bias, dropout_p=0)
    torch.testing.assert_close(layer(x), activation(expected))
    assert str(activation) in str(layer)
    assert {*activation.parameters()} <= {*layer.parameters()}


@pytest.mark.parametrize("activation", ["leaky_relu", nn.LeakyReLU()])
def test_a_leaky_relu_keeps_nothing_of_its_own(activation):
    layer = kn.KNConv2d(3, 4, 3, activation=activation)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        y = layer(torch.randn(2, 3, 5, 6))
    assert [x.data_ptr() for x in kept if x.shape == y.shape] == [y.data_ptr()]


def test_a_relu_module_is_fused():
    layer = kn.KNConv2d(3, 4, 3, activation=nn.ReLU())
    assert str(layer) == str(kn.KNConv2d(3, 4, 3, activation="relu"))
    assert layer.state_dict().keys() == {"weight", "bias"}


@pytest.mark.parametrize(("cls", "sizes"), NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_kernel_norm_is_one_call_to_the_function(cls, sizes, training):
    layer = cls(3, 2, 1, 0.3, 1e-3, evaluation="plain").train(training)
    x = torch.randn(2, 4, *sizes)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    expected = functional.kernel_norm(
        x, 3, 2, 1, dropout_p=0.3, training=training, eps=1e-3, evaluation="plain"
    )
    assert torch.equal(y, expected)
    assert y.shape[2:] == tuple(3 * ((size + 2 - 3) // 2 + 1) for size in sizes)
    assert torch.equal(layer.eval()(x[0]), layer(x)[0])


@pytest.mark.parametrize(("cls", "conv", "sizes"), CONVS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_loads_from_a_convolution(cls, conv, sizes, bias):
    source, layer = conv(4, 6, 3, bias=bias), cls(4, 6, 3, bias=bias)
    assert isinstance(layer, conv)
    assert [*layer.state_dict()] == [*source.state_dict()]
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.weight, source.weight)


def test_initial_weights_are_those_of_a_convolution():
    torch.manual_seed(0)
    source = nn.Conv2d(4, 6, 3)
    torch.manual_seed(0)
    layer = kn.KNConv2d(4, 6, 3)
    assert torch.equal(layer.weight, source.weight)
    assert torch.equal(layer.bias, source.bias)


def test_stride_defaults_to_the_kernel_size():
    assert kn.KernelNorm2d((3, 2)).stride == (3, 2)
    assert kn.KernelNorm2d(2)(torch.randn(1, 1, 7, 6)).shape == (1, 1, 6, 6)


def test_defaults_are_the_papers():
    conv, norm = kn.KNConv2d(1, 1, 1), kn.KernelNorm2d(1)
    assert conv.dropout_p == norm.dropout_p == 0.1
    assert conv.bias is not None
    assert conv.evaluation == norm.evaluation == "expected"


def test_repr():
    layer = kn.KNConv2d(3, 8, 3, padding="same", dropout_p=0.2, activation="relu")
    assert repr(layer) == (
        "KNConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=same, "
        "dropout_p=0.2, eps=1e-05, activation=relu)"
    )
    assert repr(kn.KernelNorm1d(2, padding=1)) == (
        "KernelNorm1d(kernel_size=(2,), stride=(2,), padding=(1,), dropout_p=0.1, eps=1e-05)"
    )


def test_repr_shows_another_evaluation():
    layer = kn.set_evaluation(nn.Sequential(kn.KNConv2d(3, 8, 3), kn.KernelNorm2d(1)), "plain")
    assert repr(layer).count("evaluation=plain") == 2


def test_device_and_dtype():
    layer = kn.KNConv2d(3, 8, 3, device="meta", dtype=torch.float64)
    assert layer.weight.is_meta
    assert layer.bias.dtype == torch.float64


def test_there_are_no_buffers_and_kernel_norm_has_no_parameters():
    assert not [*kn.KNConv2d(3, 8, 3).buffers(), *kn.KernelNorm2d(3).buffers()]
    assert not [*kn.KernelNorm2d(3).parameters()]


def test_set_evaluation_reaches_every_layer():
    network = nn.Sequential(kn.KNConv2d(3, 8, 3), nn.Sequential(kn.KernelNorm2d(1), nn.ReLU()))
    assert kn.set_evaluation(network, "monte_carlo") is network
    assert network[0].evaluation == network[1][0].evaluation == "monte_carlo"
    with pytest.raises(ValueError, match=r"evaluation must be one of .*got 'bayes'"):
        kn.set_evaluation(network, "bayes")
    assert network[0].evaluation == "monte_carlo"
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got list"):
        kn.set_evaluation([network], "plain")


@pytest.mark.parametrize("size", [np.int64(3), np.array([3, 3]), torch.tensor([3, 3]), [3, 3]])
def test_sizes_are_whatever_convolutions_of_pytorch_take(size: Any):
    layer = kn.KNConv2d(np.int64(3), 8, size, stride=np.int64(2), groups=np.int64(1))
    assert (layer.kernel_size, layer.stride) == ((3, 3), (2, 2))
    assert "np." not in repr(layer)
    assert layer(torch.randn(1, 3, 7, 7)).shape == (1, 8, 3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kn.KNConv2d(3, 8, 0), "kernel_size must be an integer of at least 1.*got 0"),
        (lambda: kn.KNConv2d(3, 8, (3, 3, 3)), r"kernel_size must be .*2 of them, got \(3, 3, 3\)"),
        (lambda: kn.KNConv2d(3, 8, 3, stride=0), "stride must be an integer of at least 1"),
        (lambda: kn.KNConv2d(3, 8, 3, padding=-1), "padding must be an integer of at least 0"),
        (lambda: kn.KNConv2d(3, 8, 3, padding="full"), "padding must be 'same', 'valid' or"),
        (lambda: kn.KNConv2d(3, 8, 3, 2, "same"), "padding='same' needs a stride of 1"),
        (lambda: kn.KNConv2d(3, 8, 3, dilation=0), "dilation must be an integer of at least 1"),
        (
            lambda: kn.KNConv2d(3, 8, 3, groups=2),
            "groups must .* divides in_channels=3 and .* got 2",
        ),
        (
            lambda: kn.KNConv2d(0, 8, 3),
            r"in_channels must be an integer of at least 1 and below 2\*\*31, got 0",
        ),
        (lambda: kn.KNConv2d(3, "8", 3), "out_channels must be an integer of at least 1 .*got '8'"),
        (lambda: kn.KNConv2d(3, 8, 3, groups=None), "groups must be a positive .* got None"),
        (lambda: kn.KNConv2d(3, 8, 3, padding_mode="x"), "padding_mode must be one of .*got 'x'"),
        (lambda: kn.KNConv2d(3, 8, 3, dropout_p=1), "dropout_p must be at least 0 and below 1"),
        (lambda: kn.KNConv2d(3, 8, 3, eps=0), "eps must be at least 1.2e-38 and finite, got 0"),
        (
            lambda: kn.KNConv2d(3, 8, 3, eps=torch.inf),
            "eps must be at least 1.2e-38 and finite, got inf",
        ),
        (lambda: kn.KNConv2d(3, 8, 3, activation="x"), "activation must be None, 'relu', "),
        (lambda: kn.KNConv2d(3, 8, 3, evaluation="x"), "evaluation must be one of"),
        (lambda: kn.KernelNorm2d(0), "kernel_size must be an integer of at least 1"),
        (lambda: kn.KernelNorm2d(3, 1, "same"), "padding must be an integer .* got 'same'"),
        (lambda: kn.KernelNorm2d(2, 0), "stride must be an integer of at least 1"),
        (lambda: kn.KernelNorm2d(2, dropout_p=-1), "dropout_p must be at least 0"),
        (lambda: kn.KernelNorm2d(2, eps=-1), "eps must be at least"),
        (lambda: kn.KernelNorm3d((2, 2)), r"kernel_size must be .*3 of them, got \(2, 2\)"),
    ],
)
def test_constructor_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_input_errors():
    with pytest.raises(ValueError, match=r"input must have 4 dimensions, or 3 without .*\(2, 3\)"):
        kn.KNConv2d(3, 8, 3)(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"input must have 5 dimensions, or 4 without"):
        kn.KernelNorm3d(1)(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"input must have 3 channels .* got 4"):
        kn.KNConv2d(3, 8, 3)(torch.randn(2, 4, 8, 8))
    with pytest.raises(TypeError, match=r"input must be in float32, .*int64"):
        kn.KernelNorm2d(1)(torch.ones(2, 3, 4, 4).long())


@pytest.mark.parametrize("module", [kn, kn.models])
def test_what_can_be_seen_is_public(module):
    assert [name for name in dir(module) if name != "__version__"] == sorted(module.__all__)
