"""The gradients and norms of each sample are those of a loop over the samples, masks included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("opacus")

from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch.optim import SGD

import kernelnorm as kn
from kernelnorm.norms import WSConv2d
from kernelnorm.privacy import PrivacyEngine, gradients
from kernelnorm.privacy.engine import BookkeepingModule
from tests.per_sample import (
    assert_close,
    clipped_sums,
    loader,
    losses_of,
    norms,
    projection,
    reduced,
    sample_gradients,
    trained,
)
from tests.strategies import CHANNELS_LAST, Case, cases

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

KNCONVS = {1: kn.KNConv1d, 2: kn.KNConv2d, 3: kn.KNConv3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ACTIVATIONS: dict[str, Callable[[], str | nn.Module | None]] = {
    "none": lambda: None,
    "relu": lambda: "relu",
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "module": lambda: nn.SiLU(),
}


PADDINGS = ["zeros", "zeros", "reflect", "replicate", "circular", "same"]


@dataclass
class Layer:
    """A random layer and how to call it."""

    case: Case
    bias: bool
    activation: str
    dropout_p: float
    padding: str
    reduction: str
    needs_input: bool

    def module(self, eps: float) -> nn.Module:
        torch.manual_seed(self.case.seed)
        return KNCONVS[self.case.d](
            *self.arguments(),
            dropout_p=self.dropout_p,
            eps=eps,
            activation=ACTIVATIONS[self.activation](),
            evaluation="monte_carlo",
        ).double()

    def convolution(self) -> nn.Module:
        torch.manual_seed(self.case.seed)
        return CONVS[self.case.d](*self.arguments()).double()

    def standardised(self, eps: float) -> nn.Module:
        torch.manual_seed(self.case.seed)
        *arguments, _ = self.arguments()
        return WSConv2d(*arguments, eps=eps).double()

    def arguments(self) -> tuple[object, ...]:
        case, (kernel_size, stride, padding, dilation) = self.case, self.case.geometry
        if self.padding == "same":
            stride, padding = (1,) * case.d, "same"
        mode = "zeros" if self.padding == "same" else self.padding
        if mode in ("reflect", "circular") and any(
            p >= size for p, size in zip(case.geometry.padding, case.sizes, strict=True)
        ):
            mode = "replicate"
        channels = case.in_channels, case.out_channels
        return *channels, kernel_size, stride, padding, dilation, case.groups, self.bias, mode

    def input(self) -> Tensor:
        return self.case.input().detach().requires_grad_(self.needs_input)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    return Layer(
        case=draw(cases()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([*ACTIVATIONS])),
        dropout_p=draw(st.sampled_from([0.1, 0.5])),
        padding=draw(
            st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular", "same"])
        ),
        reduction=draw(st.sampled_from(["mean", "sum"])),
        needs_input=draw(st.booleans()),
    )


def backward(network: nn.Module, x: Tensor, reduction: str) -> None:
    reduced(losses_of(network, x, projection), reduction).backward()


def check_hooks(network: nn.Module, x: Tensor, expected: list[Tensor], reduction: str) -> None:
    wrapped = GradSampleModule(network, loss_reduction=reduction)
    backward(wrapped, x, reduction)
    for parameter, gradient in zip(trained(network), expected, strict=True):
        assert_close(parameter.grad_sample, gradient)
    wrapped.to_standard_module()


def assert_same_norms(actual: Tensor, expected: Tensor) -> None:
    """Compares the squares: a ghost norm is the root of a sum whose terms may cancel."""
    assert_close(actual.square(), expected.square())


def check_ghost(network: nn.Module, x: Tensor, expected: list[Tensor], reduction: str) -> None:
    wrapped = GradSampleModuleFastGradientClipping(network, loss_reduction=reduction)
    backward(wrapped, x, reduction)
    for parameter, gradient in zip(trained(network), expected, strict=True):
        assert_same_norms(parameter._norm_sample, gradient.flatten(1).norm(dim=1))
    wrapped.to_standard_module()


def check_bookkeeping(
    network: nn.Module, x: Tensor, expected: list[Tensor], reduction: str
) -> None:
    wrapped = BookkeepingModule(network, loss_reduction=reduction)
    backward(wrapped, x, reduction)
    assert_same_norms(wrapped.book.norms(), norms(expected))
    bound = 0.5 * norms(expected).mean().item() if len(x) else 1.0
    sums = wrapped.book.clipped_sums(bound)
    for parameter, total in zip(trained(network), clipped_sums(expected, bound), strict=True):
        assert_close(sums[parameter], total)
    wrapped.to_standard_module()


MODES = [check_hooks, check_ghost, check_bookkeeping]


@pytest.mark.parametrize("ghost", [True, False])
@given(layer=layers())
@settings(max_examples=60, deadline=None)
def test_gradients_of_random_layers(layer: Layer, ghost: bool) -> None:
    # Windows without variance have large gradients, which cancel: too much so for ghost norms.
    network, x = layer.module(eps=0.1 if ghost else 1e-5), layer.input()
    expected = sample_gradients(network, x, projection)
    with mock.patch.object(gradients, "ghost_is_faster", return_value=ghost):
        for check in MODES:
            check(network, x, expected, layer.reduction)


@pytest.mark.parametrize("ghost", [True, False])
@given(layer=layers())
@settings(max_examples=30, deadline=None)
def test_gradients_of_ordinary_convolutions(layer: Layer, ghost: bool) -> None:
    network, x = layer.convolution(), layer.input()
    expected = sample_gradients(network, x, projection)
    with mock.patch.object(gradients, "ghost_is_faster", return_value=ghost):
        check_bookkeeping(network, x, expected, layer.reduction)


@pytest.mark.parametrize("ghost", [True, False])
@given(layer=layers().filter(lambda layer: layer.case.d == 2))
@settings(max_examples=30, deadline=None)
def test_gradients_of_standardised_convolutions(layer: Layer, ghost: bool) -> None:
    network, x = layer.standardised(eps=0.1 if ghost else 1e-5), layer.input()
    expected = sample_gradients(network, x, projection)
    with mock.patch.object(gradients, "ghost_is_faster", return_value=ghost):
        check_bookkeeping(network, x, expected, layer.reduction)


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer", [nn.Conv1d, kn.KNConv1d, nn.Conv2d, kn.KNConv2d])
def test_windows_of_one_pixel(layer: type[nn.Module], groups: int, ghost: bool) -> None:
    torch.manual_seed(0)
    network = layer(4, 6, 1, groups=groups).double()
    x = torch.randn(3, 4, *[5] * (network.weight.dim() - 2)).double()
    with mock.patch.object(gradients, "ghost_is_faster", return_value=ghost):
        check_bookkeeping(network, x, sample_gradients(network, x, projection), "mean")


def network_of(activation: str | nn.Module | None = "relu", p: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        kn.KNConv2d(3, 8, 3, padding=1, dropout_p=p, activation=activation),
        kn.KNConv2d(8, 6, 3, stride=2, groups=2, dropout_p=p, activation=activation),
        kn.KernelNorm2d(1, dropout_p=p),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    ).double()


def images(n: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 9, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("check", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_gradients_of_a_network(check: Callable[..., None], activation: str, n: int) -> None:
    network, x = network_of(ACTIVATIONS[activation]()), images(n)
    check(network, x, sample_gradients(network, x, projection), "sum")


@pytest.mark.parametrize("check", MODES)
def test_gradients_in_channels_last(check: Callable[..., None]) -> None:
    network, x = network_of(), images()
    expected = sample_gradients(network, x, projection)
    network.to(memory_format=CHANNELS_LAST[2])
    check(network, x.to(memory_format=CHANNELS_LAST[2]), expected, "mean")


def test_an_activation_with_parameters() -> None:
    """Opacus hooks it on its own. Its ghost mode refuses parameters within a layer."""
    network, x = network_of(nn.PReLU()), images()
    network[1].activation = nn.PReLU()
    network.double()
    check_hooks(network, x, sample_gradients(network, x, projection), "mean")
    with pytest.raises(NotImplementedError, match="PReLU"):
        BookkeepingModule(network)


def test_an_activation_with_randomness_of_its_own() -> None:
    """The gradients pass the forward pass' own draw of it."""
    network, x = network_of(nn.RReLU()), images()
    for check in MODES:
        check(network, x, sample_gradients(network, x, projection), "mean")


@pytest.mark.parametrize("check", MODES)
@pytest.mark.parametrize("frozen", ["0.weight", "1.bias", "5.weight"])
def test_frozen_parameters_have_no_gradients(check: Callable[..., None], frozen: str) -> None:
    network, x = network_of(), images()
    dict(network.named_parameters())[frozen].requires_grad_(False)
    check(network, x, sample_gradients(network, x, projection), "mean")


@pytest.mark.parametrize("check", MODES)
def test_masks_are_those_of_the_forward_pass(check: Callable[..., None]) -> None:
    """No mask is drawn but those of the forward pass, and other masks give other gradients."""
    network, x = network_of(), images()
    expected = sample_gradients(network, x, projection)
    others = sample_gradients(network, x, projection, seed=8)
    assert (norms(expected) - norms(others)).abs().min() > 1e-3
    draws = mock.Mock(wraps=kn.functional.draw_keys)
    with mock.patch.object(kn.functional, "draw_keys", draws):
        check(network, x, expected, "mean")
    assert draws.call_count == 3  # one for each KNConv and the KernelNorm


@pytest.mark.parametrize("check", [check_hooks])
def test_a_layer_that_is_called_twice(check: Callable[..., None]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kn.KNConv2d(3, 3, 3, padding=1, dropout_p=0.5, activation=nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    torch.manual_seed(0)
    network = Twice().double()
    check(network, images(), sample_gradients(network, images(), projection), "mean")


def test_samplers_are_there_without_an_import_of_this_package() -> None:
    """Opacus' own engine needs nothing but a kernel network: its hooks bring the samplers."""
    from opacus import PrivacyEngine as Opacus
    from opacus.grad_sample import GradSampleHooks

    network = network_of().float()
    sampler = GradSampleHooks.GRAD_SAMPLERS.pop(kn.KNConv2d)
    with mock.patch.dict("sys.modules"):
        import sys

        for name in [name for name in sys.modules if name.startswith("kernelnorm.privacy")]:
            del sys.modules[name]
        wrapped, *_ = Opacus(accountant="rdp").make_private(
            module=network,
            optimizer=SGD(network.parameters(), lr=0.1),
            data_loader=loader(images().float(), 2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    assert kn.KNConv2d in GradSampleHooks.GRAD_SAMPLERS
    GradSampleHooks.GRAD_SAMPLERS[kn.KNConv2d] = sampler
    projection(wrapped(images().float())).mean().backward()
    assert all(len(p.grad_sample) == 5 for p in network.parameters())


@pytest.mark.parametrize("wrap", [GradSampleModule, GradSampleModuleFastGradientClipping])
def test_subclasses_raise_rather_than_draw_another_mask(wrap: type) -> None:
    """Opacus runs layers of unknown types once more."""

    class Doubled(kn.KNConv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    network = wrap(Doubled(3, 4, 3))
    with pytest.raises(RuntimeError, match="random"):
        projection(network(torch.randn(2, 3, 5, 5))).mean().backward()


def test_hooks_of_others_stay_as_they_are() -> None:
    calls = []
    layer = kn.KNConv2d(3, 4, 3)
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(1, 3, 5, 5))
    handle.remove()
    layer(torch.randn(1, 3, 5, 5))
    assert calls == [1]


def test_inputs_without_a_batch_are_refused() -> None:
    wrapped = GradSampleModule(kn.KNConv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"input of shape \(3, 5, 5\)"):
        wrapped(torch.randn(3, 5, 5))


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bookkeeping"])
def test_all_modes_take_the_same_step(mode: str) -> None:
    """With one noise generator, also the noise is the same."""
    network, x = network_of(), images(6)
    optimizer = SGD(network.parameters(), lr=0.1)
    expected = [p.detach().clone() for p in network.parameters()]
    for mode_of, result in (("hooks", expected), (mode, [*network.parameters()])):
        copied = network_of()
        optimizer = SGD(copied.parameters(), lr=0.1)
        made = PrivacyEngine(accountant="rdp").make_private(
            module=copied,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss(),
            data_loader=loader(x, 6),
            noise_multiplier=1.0,
            max_grad_norm=0.5,
            grad_sample_mode=mode_of,
            noise_generator=torch.Generator().manual_seed(3),
        )
        criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
        made[1].zero_grad()
        torch.manual_seed(2)
        criterion(made[0](x), torch.arange(6) % 4).backward()
        made[1].step()
        with torch.no_grad():
            for old, new in zip(result, copied.parameters(), strict=True):
                assert not torch.equal(old, new)
                old.copy_(new)
    for one, other in zip(expected, network.parameters(), strict=True):
        assert_close(other.detach(), one)
