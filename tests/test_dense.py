"""A dense block in one buffer against the same layers with concatenations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from kernelnorm.models import densenet
from kernelnorm.models.blocks import layers_for
from kernelnorm.ops import dense, pointwise


def block_of(
    growth: int = 3, depth: int = 3, norm: str = "kernel", rules: dict[str, Any] | None = None
) -> densenet.DenseBlock:
    made = layers_for(norm, rules)
    layers = [
        densenet.DenseLayer(made, 4 + i * growth, growth, before_head=i == depth - 1)
        for i in range(depth)
    ]
    block = densenet.DenseBlock(*layers).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


def concatenated(block: densenet.DenseBlock, x: Tensor) -> Tensor:
    for layer in block:
        x = layer(x)
    return x


def run(function, block: nn.Module, x: Tensor, create_graph: bool = False) -> list[Tensor]:
    """The output and the gradients; with ``create_graph`` those of the gradients' squares too."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    inputs = [x, *block.parameters()]
    y = function(x)
    gradients = torch.autograd.grad(y.sin().sum(), inputs, create_graph=create_graph)
    if create_graph:
        total = sum(g.square().sum() for g in gradients)
        second = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        gradients = (*gradients, *second)
    return [y, *gradients]


@pytest.fixture(params=[True, False], autouse=True)
def products_are_fast(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(pointwise, "_products_are_fast", lambda: request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_it_is_the_concatenation(x: Tensor, training: bool, create_graph: bool, memory_format):
    block, x = block_of().train(training), x.contiguous(memory_format=memory_format)
    results = run(block, block, x, create_graph)
    expected = run(lambda x: concatenated(block, x), block, x, create_graph)
    assert type(results[0].grad_fn).__name__ == "_DenseBlockBackward"
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "rules",
    [{"dropout_p": 0.0}, {"dropout_p": 0.5}, {"head": False}, {"evaluation": "monte_carlo"}],
)
def test_it_is_the_concatenation_under_other_rules(x: Tensor, rules: dict[str, Any], training):
    block, x = block_of(rules=rules).train(training), x[..., :2]  # too small for compiled loops
    results = run(block, block, x)
    assert type(results[0].grad_fn).__name__ == "_DenseBlockBackward"
    for a, b in zip(results, run(lambda x: concatenated(block, x), block, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + b.abs().max().item()))


SAMPLE = 13 * 30 * 8
"""The bytes of a sample in a buffer."""


@pytest.mark.parametrize(("samples", "part", "sizes"), [
    (0, 1, [0]), (1, 1, [1]), (3, 1, [1, 1, 1]), (5, 2 * SAMPLE, [3, 2]), (5, 9 * SAMPLE, [5]),
])  # fmt: skip
def test_evaluation_in_parts(
    monkeypatch: pytest.MonkeyPatch, samples: int, part: int, sizes: list[int]
):
    fill, filled = dense._fill, []
    monkeypatch.setattr(dense, "_PART", part)
    monkeypatch.setattr(dense, "_fill", lambda *a: filled.append(len(a[0])) or fill(*a))
    block, x = block_of().eval(), torch.randn(samples, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        y = block(x)
    assert filled == sizes
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, concatenated(block, x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own parts
def test_forward_mode_is_refused_not_forgotten(x: Tensor):
    block = block_of().eval()
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        block(forward_ad.make_dual(x, torch.ones_like(x)))


def test_frozen_tensors_get_no_gradient(x: Tensor):
    block = block_of()
    full = dict(block.named_parameters())
    torch.manual_seed(0)
    block(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in full.items()}
    for kept in ("1.conv1.weight", "2.conv2.bias"):
        for name, parameter in full.items():
            parameter.grad = None
            parameter.requires_grad_(name == kept)
        torch.manual_seed(0)
        block(x).square().sum().backward()
        torch.testing.assert_close(full[kept].grad, expected[kept])
        assert all(p.grad is None for name, p in full.items() if name != kept)


def test_incoming_gradients_are_left_alone(x: Tensor):
    block = block_of()
    y = block(x.requires_grad_())
    grad = torch.randn_like(y)
    before = grad.clone()
    torch.autograd.grad(y, x, grad, retain_graph=True)
    assert torch.equal(grad, before)
    (one,) = torch.autograd.grad(y.sum(), x, retain_graph=True)  # an expanded gradient
    (two,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(one, two)


def test_several_gradients_at_once(x: Tensor):
    block = block_of()
    y = block(x.requires_grad_())
    inputs, grads = [x, *block.parameters()], torch.randn(3, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        alone = torch.autograd.grad(y, inputs, grad, retain_graph=True)
        torch.testing.assert_close([t[i] for t in together], [*alone], rtol=1e-9, atol=1e-9)


def test_a_hook_sees_its_layer(x: Tensor):
    block, seen = block_of(), []
    block[1].conv1.register_forward_hook(lambda *_: seen.append(1))
    block(x)
    assert seen == [1]


def test_a_layer_that_was_replaced_is_called(x: Tensor):
    block = block_of()
    block[2].conv2 = nn.Conv2d(12, 3, 3, padding=1).double()
    assert type(block(x).grad_fn).__name__ == "CatBackward0"


def test_other_norms_are_concatenated(x: Tensor):
    assert type(block_of(norm="batch")(x).grad_fn).__name__ == "CatBackward0"


def test_autocast_gives_its_dtype(x: Tensor):
    block = block_of().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_functional_transforms_see_the_layers(x: Tensor, training: bool):
    block = block_of().train(training)
    parameters = dict(block.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y = torch.func.functional_call(block, parameters, (sample.unsqueeze(0),))
        return y.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(
        parameters, x
    )
    assert all(g.shape[0] == 2 for g in per_sample.values())
