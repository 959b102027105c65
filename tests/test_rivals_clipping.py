"""Adaptive gradient clipping against a loop over units."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernelnorm.models import create_model
from kernelnorm.norms import adaptive_clip_grad_, clipped_parameters


def clipped(weight: Tensor, grad: Tensor, factor: float, eps: float = 1e-3) -> Tensor:
    """The formula, one unit after another."""
    units = [...] if sum(size > 1 for size in weight.shape) <= 1 else [*range(len(weight))]
    result = grad.clone()
    for unit in units:
        largest = factor * max(math.hypot(*weight[unit].flatten().tolist()), eps)
        norm = math.hypot(*grad[unit].flatten().tolist())
        if norm > largest:
            result[unit] = grad[unit] * largest / norm
    return result


SHAPES = [(), (5,), (4, 6), (4, 3, 3, 3), (4, 1, 3, 3), (6, 1, 1, 1), (1, 3, 2, 2), (2, 3, 4)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from([1e-4, 0.01, 1.0, 100.0]))
def test_units_are_clipped_one_by_one(shape: tuple[int, ...], factor: float) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.float64) * torch.rand(shape[:1] + (1,) * len(shape[1:]))
    weight.grad = grad.clone()
    adaptive_clip_grad_([weight], factor)
    torch.testing.assert_close(weight.grad, clipped(weight.detach(), grad, factor))


def test_zeros_stay_zeros_and_may_grow() -> None:
    zero, no_grad = torch.zeros(4, 3), torch.ones(4, 3)
    for weight, expected in ((zero, 1e-5), (no_grad, 0.0)):
        weight.requires_grad_()
        weight.grad = torch.zeros(4, 3) if weight is no_grad else torch.ones(4, 3)
        adaptive_clip_grad_([weight], 0.01)
        norms = weight.grad.norm(dim=1)
        torch.testing.assert_close(norms, torch.full((4,), expected))


def test_parameters_without_gradients_and_in_half_precision() -> None:
    half = torch.full((2, 4), 1000.0, dtype=torch.float16, requires_grad=True)
    half.grad = torch.full((2, 4), 30000.0, dtype=torch.float16)  # its square is infinite
    adaptive_clip_grad_([torch.ones(3, requires_grad=True), half], 1.0)
    torch.testing.assert_close(half.grad, torch.full_like(half, 1000.0), rtol=2e-3, atol=0)


def test_one_parameter_and_what_is_no_parameter() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    weight.grad = torch.full((2, 3), 1e6)
    with pytest.raises(TypeError, match="parameters must be tensors, got tuple"):
        adaptive_clip_grad_(nn.Linear(2, 2).named_parameters())  # type: ignore[arg-type]
    adaptive_clip_grad_(weight, 0.01)
    torch.testing.assert_close(weight.grad, torch.full((2, 3), 0.01))


def test_infinite_gradients_stay_visible() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    weight.grad = torch.tensor([[math.inf, 1.0], [math.nan, 1.0]])
    adaptive_clip_grad_([weight])
    assert weight.grad.isnan().any(dim=1).all()


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["clip_factor", "eps"])
def test_wrong_arguments_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got {value}"):
        adaptive_clip_grad_([], **{name: value})


@pytest.mark.parametrize(("name", "last"), [("vgg8", "classifier"), ("resnet18", "fc")])
def test_the_last_linear_layer_is_left_out(name: str, last: str) -> None:
    with torch.device("meta"):
        network = create_model(name, norm="nf")
    left = {id(p) for p in clipped_parameters(network)}
    out = [key for key, p in network.named_parameters() if id(p) not in left]
    assert out == [f"{last}.weight", f"{last}.bias"]


def test_a_network_without_a_linear_layer_has_all_parameters_clipped() -> None:
    conv = nn.Conv2d(3, 4, 3)
    assert clipped_parameters(conv) == [conv.weight, conv.bias]
