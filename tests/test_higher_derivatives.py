"""Derivatives of derivatives, and forward-mode ones, where something watches or changes a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernelnorm as kn
from kernelnorm.ops.concatenation import concatenate
from tests.networks import assert_all_close


class Watch(TorchDispatchMode):
    """Watches and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)


LAYERS = {
    "kn_conv": lambda: kn.KNConv2d(3, 4, 3, padding=1, activation="relu", dtype=torch.float64),
    "pixel_norm": lambda: kn.KernelNorm2d(1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_with_hooks_of_saved_tensors(name: str, x: Tensor):
    layer = LAYERS[name]()
    results = []
    for context in (torch.autograd.graph.save_on_cpu(), torch.enable_grad()):
        with context:
            torch.manual_seed(0)
            (first,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
            results.append([first, *torch.autograd.grad(first.square().sum(), x)])
    assert_all_close(*results, tolerance=1e-12)


def test_a_gradient_penalty_in_a_checkpoint(x: Tensor):
    layer = LAYERS["kn_conv"]()

    def penalty(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        return first.square().sum()

    results = []
    for function in (penalty, lambda x: checkpoint(penalty, x, use_reentrant=False)):
        torch.manual_seed(0)
        results.append([*torch.autograd.grad(function(x), [x, layer.weight])])
    assert_all_close(*results, tolerance=1e-12)


def test_second_derivatives_stop_at_a_detached_concatenation():
    w = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    layer = kn.KNConv2d(4, 2, 3, dtype=torch.float64).eval()
    ab = concatenate(w * 1, w * 2).detach_()
    y = layer(ab).square().sum()
    del ab
    (first,) = torch.autograd.grad(y, layer.weight, create_graph=True)
    first.square().sum().backward()
    assert w.grad is None


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_can_be_changed_in_place(groups: int):
    layer = kn.KNConv2d(256, 256, 3, padding=1, groups=groups)
    y = layer(torch.randn(1, 256, 2, 2)).square().sum()
    for gradient in torch.autograd.grad(y, [*layer.parameters()]):
        before = gradient.clone()
        gradient.add_(torch.ones_like(gradient).requires_grad_())
        torch.testing.assert_close(gradient, before + 1)
        assert gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_checkpoints_where_a_mode_watches_one_of_two_passes(where: str, x: Tensor):
    layer = LAYERS["kn_conv"]()
    torch.manual_seed(0)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    torch.manual_seed(0)
    with Watch() if where == "forward" else torch.enable_grad():
        y = checkpoint(layer, x, use_reentrant=False)
    with Watch() if where == "backward" else torch.enable_grad():
        y.square().sum().backward()
    assert_all_close([x.grad, layer.weight.grad], [*expected], tolerance=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own parts
@pytest.mark.parametrize("how", ["compiled", "mode", "plain"])
def test_forward_mode_is_an_error(how: str, x: Tensor):
    network = nn.Sequential(LAYERS["kn_conv"](), nn.Conv2d(4, 2, 1, dtype=torch.float64))
    network.eval().requires_grad_(False)
    call = torch.compile(network, backend="eager") if how == "compiled" else network
    with forward_ad.dual_level(), Watch() if how == "mode" else torch.enable_grad():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            call(dual)
