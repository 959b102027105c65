"""Convolutions of single pixels as products of matrices, against PyTorch's convolutions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernelnorm.functional import kn_conv
from kernelnorm.ops import pointwise
from kernelnorm.ops.windows import Geometry

PIXEL = Geometry((1, 1), (1, 1), (0, 0), (1, 1))


def prefix(n: int, channels: int, more: int, sizes: list[int]) -> Tensor:
    """Channels of longer rows; the others are poison."""
    rows = torch.full((n, *sizes, channels + more), torch.nan, dtype=torch.float64)
    rows[..., :channels] = torch.randn(n, *sizes, channels, dtype=torch.float64)
    return rows[..., :channels].movedim(-1, 1)


@settings(deadline=None)
@given(
    n=st.integers(0, 3),
    channels=st.integers(1, 9),
    more=st.integers(1, 3),
    filters=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_they_are_convolutions(n: int, channels: int, more: int, filters: int, sizes: list[int]):
    d = len(sizes)
    x = prefix(n, channels, more, sizes)
    weight = torch.randn(filters, channels, *[1] * d, dtype=torch.float64)
    inputs = [x.detach().requires_grad_(), weight.requires_grad_()]
    expected = torch.convolution(*inputs, None, [1] * d, [0] * d, [1] * d, False, [0] * d, 1)
    with torch.no_grad():
        z = pointwise.convolution(*inputs)
    assert z.movedim(1, -1).is_contiguous()
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)

    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, grad)
    with torch.no_grad():
        results = pointwise.convolution_backward(grad, x, weight, (True, True))
    for a, b in zip(results, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert pointwise.convolution_backward(grad, x, weight, (False, False)) == (None, None)


def test_where_they_pay(monkeypatch: pytest.MonkeyPatch):
    x, weight = prefix(2, 6, 1, [4, 5]), torch.randn(3, 6, 1, 1)
    monkeypatch.setattr(pointwise, "_products_are_fast", lambda: True)
    assert pointwise.pays(x, weight, PIXEL)
    assert not pointwise.pays(x.contiguous(), weight, PIXEL)
    assert not pointwise.pays(x.contiguous(memory_format=torch.channels_last), weight, PIXEL)
    assert not pointwise.pays(x, weight, PIXEL._replace(stride=(2, 2)))
    assert not pointwise.pays(x, weight, PIXEL._replace(kernel_size=(3, 3)))
    assert not pointwise.pays(x, weight[:, :2], PIXEL)  # the filters of three groups
    monkeypatch.setattr(pointwise, "_products_are_fast", lambda: False)
    assert not pointwise.pays(x, weight, PIXEL)


@pytest.mark.parametrize("dropout_p", [0.1, 0.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["weight", "input", "nothing"])
def test_a_layer_that_sees_a_part_of_longer_rows(
    monkeypatch: pytest.MonkeyPatch, dropout_p: float, training: bool, frozen: str
):
    x, weight = prefix(2, 20, 7, [6, 5]), torch.randn(9, 20, 1, 1, dtype=torch.float64)
    bias = torch.randn(9, dtype=torch.float64).requires_grad_()
    inputs = [bias]
    inputs += [weight.requires_grad_()] if frozen != "weight" else []
    x = x.requires_grad_(frozen != "input")
    inputs += [x] if frozen != "input" else []

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        y = kn_conv(x, weight, bias, dropout_p=dropout_p, training=training, activation="relu")
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    calls: list[int] = []
    convolution, backward = pointwise.convolution, pointwise.convolution_backward
    monkeypatch.setattr(pointwise, "convolution", lambda *a: calls.append(1) or convolution(*a))
    monkeypatch.setattr(
        pointwise, "convolution_backward", lambda *a: calls.append(2) or backward(*a)
    )
    monkeypatch.setattr(pointwise, "_products_are_fast", lambda: True)
    found = results()
    assert calls == [1, 2]
    monkeypatch.setattr(pointwise, "_products_are_fast", lambda: False)
    for a, b in zip(found, results(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert calls == [1, 2]
