"""The layers under torch.func, and gradients of gradients and of many at once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import kernelnorm as kn
from tests.networks import assert_all_close, conv_and_norm, images
from tests.strategies import mask_of


@pytest.fixture
def x() -> Tensor:
    return images()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [True, False])
def test_per_sample_gradients_are_those_of_a_loop(x: Tensor, training: bool):
    module = conv_and_norm().double().train(training)
    for layer in module:
        layer.dropout_p = 0.0 if training else 0.1
    parameters = dict(module.named_parameters())
    x = x.double()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, parameters, (sample[None],)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, x)
    for i, sample in enumerate(x):
        alone = grad(loss)(parameters, sample)
        assert_all_close([together[k][i] for k in alone], [*alone.values()], tolerance=1e-9)
        module.zero_grad()
        loss(dict(module.named_parameters()), sample).backward()
        assert_all_close([p.grad for p in module.parameters()], [*alone.values()], tolerance=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients_with_dropout(x: Tensor):
    """One mask for all samples, so that a loop can draw it again."""
    module = conv_and_norm().double()
    parameters, x = dict(module.named_parameters()), x.double()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, parameters, (sample[None],)).square().sum()

    torch.manual_seed(5)
    together = vmap(grad(loss), in_dims=(None, 0), randomness="same")(parameters, x)
    for i, sample in enumerate(x):
        torch.manual_seed(5)
        alone = torch.autograd.grad(loss(parameters, sample), [*parameters.values()])
        assert_all_close([together[k][i] for k in parameters], [*alone], tolerance=1e-9)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_several_output_gradients_at_once(x: Tensor, activation: str | None):
    """The written backward under vmap, of a forward that ran in a backend's kernels."""
    layer = kn.KNConv2d(4, 8, 3, activation=activation, dtype=torch.float64)
    x = x.double().repeat(1, 1, 4, 4).requires_grad_()
    y = layer(x)
    inputs, grads = [x, *layer.parameters()], torch.randn(3, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(grads):
        alone = torch.autograd.grad(y, inputs, g, retain_graph=True)
        assert_all_close([t[i] for t in together], [*alone], tolerance=1e-9)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_masks_as_it_is_told(x: Tensor, randomness: str):
    layer = kn.KNConv2d(4, 8, 3, dropout_p=0.5)
    twice = torch.stack([x, x])
    first, second = vmap(layer, randomness=randomness)(twice)
    assert torch.equal(first, second) == (randomness == "same")


@pytest.mark.parametrize("keys", ["a mask that drops nothing", "no mask"])
def test_second_derivatives_at_windows_of_one_value(keys: str):
    """They do not depend on which way rounding left a variance of zero."""
    masked = keys != "no mask"
    layer = kn.KNConv2d(12, 2, 1, bias=False, dtype=torch.float64, dropout_p=0.1 * masked)
    shape = 1, 12, 1, 1
    seed = 0
    while masked and not mask_of(seed, torch.Size(shape), 0.1).all():
        seed += 1
    values = []
    for value in (1.0, 1.3, 3.0706, 2.682, 2.5306, 2.0):
        x = torch.full(shape, value, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(seed)
        (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[0, 0].sum(), x)
        values.append(second.abs().max().item() / (value if masked else 1))
    assert max(values) - min(values) <= 1e-6 * max(*values, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own parts
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_forward_mode_derivatives(x: Tensor):
    """In evaluation; ``linearize`` has no rule for a KNConv."""
    module, x = conv_and_norm().double().eval(), x[:1, :, :5, :5].double()
    jacobian = torch.autograd.functional.jacobian(module, x)
    y, derivative = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    assert_all_close([y, derivative], [module(x), jacobian.sum((4, 5, 6, 7))], tolerance=1e-9)
    assert_all_close([torch.func.jacfwd(module)(x)], [jacobian], tolerance=1e-9)

    def scalar(x: Tensor) -> Tensor:
        return module(x).sin().sum()

    expected = torch.autograd.functional.hessian(scalar, x)
    assert_all_close([torch.func.hessian(scalar)(x)], [expected], tolerance=1e-9)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.linearize(module, x)


def test_an_ensemble_under_vmap():
    def make() -> nn.Module:
        return nn.Sequential(
            kn.KNConv2d(3, 8, 3, padding=1, activation="relu"), kn.KernelNorm2d(1),
            kn.KNConv2d(8, 8, 3, stride=2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 4),
        )  # fmt: skip

    networks = [make().eval() for _ in range(3)]
    parameters, buffers = stack_module_state(networks)
    base, x = copy.deepcopy(networks[0]).to("meta"), torch.randn(2, 3, 16, 16)

    def call(parameters, buffers, x: Tensor) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))

    def loss(parameters, buffers, x: Tensor) -> Tensor:
        return call(parameters, buffers, x).square().sum()

    y = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(y, torch.stack([n(x) for n in networks]), rtol=1e-4, atol=1e-4)
    gradients = vmap(grad(loss), in_dims=(0, 0, None))(parameters, buffers, x)
    networks[1](x).square().sum().backward()
    for name, parameter in networks[1].named_parameters():
        torch.testing.assert_close(gradients[name][1], parameter.grad, rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in parameters.values())
    base.train()
    z = vmap(call, in_dims=(0, 0, None), randomness="different")(parameters, buffers, x)
    assert z.shape == y.shape
