"""Concatenations that remember their parts, and dense blocks against plain concatenations."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kernelnorm as kn
from kernelnorm.models import create_model, densenet
from kernelnorm.models.blocks import layers_for
from kernelnorm.ops.concatenation import concatenate, parts_of


def plain(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 1)


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


def concatenated(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layers one by one, with plain concatenations."""

    def forward(x: Tensor) -> Tensor:
        with mock.patch.object(densenet, "concatenate", plain):
            for layer in block:
                x = layer(x)
        return x

    return forward


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


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + b.abs().max().item()))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_block_is_its_layers_with_plain_concatenations(
    x: Tensor, training: bool, create_graph: bool, memory_format
):
    block, x = block_of().train(training), x.contiguous(memory_format=memory_format)
    results = run(block, block, x, create_graph)
    assert_same(results, run(concatenated(block), block, x, create_graph))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "rules",
    [{"dropout_p": 0.0}, {"dropout_p": 0.5}, {"head": False}, {"evaluation": "monte_carlo"}],
)
def test_it_is_so_under_other_rules(x: Tensor, rules: dict[str, Any], training):
    block = block_of(rules=rules).train(training)
    assert_same(run(block, block, x), run(concatenated(block), block, x))


@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_that_is_shared_by_layers(x: Tensor, training: bool):
    block = block_of().train(training)
    for layer in list(block)[1:]:
        layer.conv2 = block[0].conv2
    assert_same(run(block, block, x), run(concatenated(block), block, x))


def test_a_block_that_is_called_twice(x: Tensor):
    block = block_of(growth=3, depth=2)
    twice = nn.Sequential(block, nn.Conv2d(10, 4, 1).double(), block)

    def forward(x: Tensor) -> Tensor:
        return concatenated(block)(twice[1](concatenated(block)(x)))

    assert_same(run(twice, twice, x), run(forward, twice, x))


def test_only_the_parts_are_kept(x: Tensor):
    """Each channel once: the input, and the outputs of both convolutions of each layer."""
    block, kept = block_of(), {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x.requires_grad_())
    for parameter in block.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    pixels = x[:, 0].numel()
    large = sorted(t.numel() // pixels for t in kept.values() if t.numel() >= 2 * pixels)
    assert large == [3, 3, 3, 4, 12, 12, 12]  # the last output has no ReLU: its numerator
    y.sum().backward()


def test_parts_of_parts():
    a, b, c = (torch.randn(1, n, 2, requires_grad=True) for n in (1, 2, 3))
    assert parts_of(a) == (a,)
    ab = concatenate(a, b)
    assert [*map(id, parts_of(ab))] == [id(a), id(b)]
    abc = concatenate(ab, c)
    assert [*map(id, parts_of(abc))] == [id(a), id(b), id(c)]
    assert torch.equal(abc, torch.cat([a, b, c], 1))
    assert len(parts_of(abc * 1)) == len(parts_of(abc.detach())) == 1


def test_without_gradients_nothing_is_remembered():
    a, b = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    assert len(parts_of(concatenate(a, b))) == 1
    with torch.no_grad():
        assert len(parts_of(concatenate(a.requires_grad_(), b))) == 1
    with torch.inference_mode():
        assert len(parts_of(concatenate(a, b))) == 1


def test_parts_live_no_longer_than_their_concatenation():
    a, b = (torch.randn(1, 2, 3, requires_grad=True) * 1 for _ in range(2))
    references = [weakref.ref(a), weakref.ref(b)]
    ab = concatenate(a, b).detach_()
    del a, b
    gc.collect()
    assert all(reference() is not None for reference in references)
    del ab
    gc.collect()
    assert all(reference() is None for reference in references)


@pytest.fixture
def layer() -> nn.Module:
    return kn.KNConv2d(6, 4, 3, activation="relu").double()


CHANGES: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "nothing": lambda a, b, ab: None,
    "the concatenation": lambda a, b, ab: ab.mul_(3),
    "a view of it": lambda a, b, ab: ab[:, 1].add_(1),
    "its first part": lambda a, b, ab: a.mul_(3),
    "its last part": lambda a, b, ab: b[0].add_(1),
    "a part, without gradients": lambda a, b, ab: b.detach().mul_(3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_place_before_a_layer_has_it(layer: nn.Module, change: str):
    """The parts are then not those of the concatenation any more."""
    w = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for cat in (concatenate, plain):
        a, b = w * 1, w * 2
        ab = cat(a, b)
        CHANGES[change](a, b, ab)
        torch.manual_seed(0)
        loss = layer(ab).square().sum()
        results.append([*torch.autograd.grad(loss, [w, *layer.parameters()])])
    assert_same(*results)


@pytest.mark.parametrize("change", list(CHANGES)[3:])
def test_changes_in_place_before_the_backward_are_errors(layer: nn.Module, change: str):
    w = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    a, b = w * 1, w * 2
    ab = concatenate(a, b)
    loss = layer(ab).square().sum()
    CHANGES[change](a, b, ab)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_with_respect_to_a_concatenation(layer: nn.Module):
    w = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for cat in (concatenate, plain):
        ab = cat(w * 1, w * 2)
        torch.manual_seed(0)
        loss = layer(ab).square().sum()
        first = torch.autograd.grad(loss, [ab, layer.weight], create_graph=True)
        total = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(total, [ab, layer.weight, w])])
    assert_same(*results)


def test_a_saved_concatenation_is_an_ordinary_tensor():
    ab = concatenate(*(torch.randn(1, 2, 300, requires_grad=True) for _ in range(2)))
    sizes = []
    for tensor in (ab, ab * 1):
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        sizes.append(buffer.tell())
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=True), tensor)
    assert sizes[0] == sizes[1]


def test_a_part_of_inference_mode(layer: nn.Module):
    with torch.inference_mode():
        a = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    b = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for cat in (concatenate, plain):
        torch.manual_seed(0)
        loss = layer(cat(a, b)).square().sum()
        results.append([*torch.autograd.grad(loss, [b, *layer.parameters()])])
    assert_same(*results)


def test_checkpointed_layers(x: Tensor):
    block = block_of()

    def forward(x: Tensor) -> Tensor:
        for layer in block:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    assert_same(run(forward, block, x), run(concatenated(block), block, x))


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


def test_hooks_see_their_layers(x: Tensor):
    block, seen = block_of(), []
    block[1].conv1.register_forward_hook(lambda *_: seen.append("forward"))
    block[1].conv1.register_forward_pre_hook(lambda *_: seen.append("before"))
    block[1].conv1.register_full_backward_hook(lambda *_: seen.append("backward"))
    block(x).sum().backward()
    assert seen == ["before", "forward", "backward"]
    all_modules = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: all_modules.append(m))
    block(x)
    handle.remove()
    assert {m for m in block.modules() if isinstance(m, kn.KNConv2d)} <= {*all_modules}


def test_a_hook_that_changes_an_output_changes_the_block(x: Tensor):
    block = block_of()
    before = run(block, block, x)[0]
    block[1].conv2.register_forward_hook(lambda module, args, y: y * 2)
    results = run(block, block, x)
    assert_same(results, run(concatenated(block), block, x))
    assert_same([results[0][:, 7:10]], [2 * before[:, 7:10]])


def test_a_forward_that_was_replaced_is_called(x: Tensor):
    """As wrappers for checkpointing and offloading do."""
    block, calls = block_of(), []
    before = run(block, block, x)[0]
    conv = block[1].conv2
    forward = conv.forward
    conv.forward = lambda x: calls.append(1) or forward(x) + 1
    results = run(block, block, x)
    assert_same(results, run(concatenated(block), block, x))
    assert calls == [1, 1]
    assert_same([results[0][:, 7:10]], [before[:, 7:10] + 1])


def test_a_layer_that_was_replaced_is_called(x: Tensor):
    block = block_of()
    block[2].conv2 = conv = nn.Conv2d(12, 3, 3, padding=1).double()
    inputs: list[Tensor] = []
    conv.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    results = run(block, block, x)
    assert_same(results, run(concatenated(block), block, x))
    assert_same(
        [results[0][:, 10:]], [nn.functional.conv2d(inputs[0], conv.weight, conv.bias, padding=1)]
    )


def test_other_norms_are_concatenated(x: Tensor):
    block = block_of(norm="batch")
    assert_same(run(block, block, x), run(concatenated(block), block, x))


def test_autocast_gives_its_dtype(x: Tensor):
    block = block_of().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.bfloat16())
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
    if not training:
        for i, sample in enumerate(x):
            alone = torch.autograd.grad(loss(parameters, sample), [*parameters.values()])
            assert_same([g[i] for g in per_sample.values()], [*alone])


@pytest.mark.parametrize("name", ["vgg8", "resnet18", "densenet121"])
def test_features_can_be_flattened_with_view(name: str):
    """As those of the networks with BatchNorm."""
    options = {} if name == "vgg8" else {"small_images": True}
    network = create_model(name, num_classes=4, **options).eval()
    trunk = getattr(network, "features", None) or nn.Sequential(*list(network.children())[:-3])
    with torch.no_grad():
        assert trunk(torch.randn(2, 3, 32, 32)).view(2, -1).dim() == 2
