"""The layers under those who watch a call: tracers, dispatch modes, checkpoints that select."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import kernelnorm as kn
from kernelnorm.ops import observers
from tests.networks import (
    assert_all_close,
    conv_and_norm,
    images,
    operators_of,
    run,
)
from tests.strategies import laid_out

KNConv = torch.ops.kernelnorm.kn_conv.default
KNConvBackward = torch.ops.kernelnorm.kn_conv_backward.default


@pytest.fixture
def x() -> Tensor:
    return images()


@pytest.mark.parametrize(
    "tracing_mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("training", [True, False])
def test_make_fx_after_use_traces_the_network(tracing_mode: str, training: bool):
    network = nn.Sequential(
        kn.KNConv2d(8, 8, 3, padding=1, activation="relu"), kn.KNConv2d(8, 4, 1)
    ).double().train(training).requires_grad_(False)  # fmt: skip
    x = torch.randn(2, 8, 12, 10, dtype=torch.float64)
    other = torch.randn_like(x) * 3 + 1
    network(x)
    traced = make_fx(network, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    torch.manual_seed(1)
    y = traced(other)
    torch.manual_seed(1)
    torch.testing.assert_close(y, network(other), rtol=1e-9, atol=1e-9)
    expected = {"kn_conv"} if tracing_mode == "real" else set()  # fake tensors are a subclass
    assert operators_of(traced) == expected


def test_make_fx_of_a_training_step():
    layer, x = kn.KNConv2d(4, 6, 3, activation="relu"), images()
    parameters = dict(layer.named_parameters())

    def step(parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        y = torch.func.functional_call(layer, parameters, (x,))
        return [*torch.autograd.grad(y.square().sum(), [*parameters.values()])]

    traced = make_fx(step)(parameters, x)
    assert operators_of(traced) == {"kn_conv", "kn_conv_backward"}
    torch.manual_seed(1)
    results = traced(parameters, x * 2)
    torch.manual_seed(1)
    assert_all_close(results, step(parameters, x * 2))


def test_fake_tensors_have_the_shapes_strides_and_dtypes(x: Tensor):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = conv_and_norm()[:2]  # the third pads, for which older fake tensors are contiguous
    for layout in ("contiguous", "channels_last"):
        inputs = laid_out(x, layout).detach().requires_grad_()
        y = module(inputs)
        with mode:
            fake = module(mode.from_tensor(inputs))
            fake.sum().backward()
        assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


class Recorder(TorchDispatchMode):
    """Counts the operators that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[object] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_dispatch_modes_see_the_operators_and_change_nothing(x: Tensor, training: bool):
    module = conv_and_norm()[:-1].train(training)  # a KernelNorm of pixels rounds in other orders
    parameters = [*module.parameters()]
    expected = run(module, x, parameters)
    with Recorder() as recorder:
        results = run(module, x, parameters)
    assert_all_close(results, expected, tolerance=0)
    assert recorder.seen[KNConv] == recorder.seen[KNConvBackward] == 2


def test_modes_around_the_backward_alone(x: Tensor):
    module = conv_and_norm()
    parameters = [*module.parameters()]
    expected = run(module, x, parameters)[2:]
    torch.manual_seed(7)
    loss = module(x).square().sum()
    with Recorder():
        results = torch.autograd.grad(loss, parameters)
    assert_all_close([*results], expected)


def test_flops_are_counted():
    """Those of the convolutions and its gradients, and of the sums over windows of one channel."""
    layer, twin = kn.KNConv2d(32, 48, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)
    x, totals = torch.randn(2, 32, 8, 8, requires_grad=True), []
    for module in (layer, twin):
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[1] == 3 * (2 * 2 * 8 * 8 * 48 * 32 * 9)
    assert totals[1] < totals[0] < 1.01 * totals[1]


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize(
    "kept", [torch.ops.aten.convolution.default, KNConv], ids=["convolutions", "layers"]
)
def test_checkpoints_that_keep_some_results(activation: str | None, kept: object):
    context = functools.partial(create_selective_checkpoint_contexts, [kept])
    layers = [kn.KNConv2d(8, 8, 3, padding=1, activation=activation) for _ in range(2)]
    network = nn.Sequential(*layers).double()
    x = torch.randn(2, 8, 12, 10, dtype=torch.float64)
    parameters = [*network.parameters()]
    expected = run(network, x, parameters)
    results = run(
        lambda x: checkpoint(network, x, use_reentrant=False, context_fn=context), x, parameters
    )
    assert_all_close(results, expected, tolerance=1e-9)


def test_who_gets_plain_operations(x: Tensor):
    class Sub(Tensor):
        pass

    assert not observers.needs_plain_operations(x, None, nn.Parameter(x))
    assert observers.needs_plain_operations(x, x.as_subclass(Sub))
    seen = []
    torch.func.vmap(lambda t: seen.append(observers.needs_plain_operations(t)) or t)(x)
    assert seen == [True]
    assert not observers.is_observed()
    with Recorder():
        assert observers.is_observed()


def test_subclasses_of_tensors_are_kept(x: Tensor):
    class Sub(Tensor):
        pass

    module = conv_and_norm()
    y = run(module, x, [*module.parameters()])
    torch.manual_seed(7)
    z = module(x.as_subclass(Sub))
    assert type(z) is Sub
    torch.testing.assert_close(z.as_subclass(Tensor), y[0])
