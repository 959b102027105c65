"""The fast path against Equations 1 to 4, in values, gradients and memory."""

from __future__ import annotations

from math import prod
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelnorm import reference
from kernelnorm.functional import kernel_norm, kn_conv
from kernelnorm.ops import passes
from kernelnorm.ops.backends import eager
from tests.strategies import CHANNELS_LAST, Case, cases, mask_of

PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]


@pytest.fixture(scope="module", params=["default", "eager"])
def backend(request):
    """Run a test with the backend that layers select by themselves, and in PyTorch operations."""
    if request.param == "default":
        yield
    else:
        with mock.patch.object(passes, "backend_for", return_value=eager):
            yield


def assert_same(y, expected, inputs, tolerance=1e-9):
    """Equal values, and equal gradients for the same random output gradient."""
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + b.abs().max()))


def more_than_one_element(case: Case) -> bool:
    """A window of one element normalises to zero, on which side of it rounding decides."""
    return case.in_channels * prod(case.geometry.kernel_size) > 1


@pytest.mark.usefixtures("backend")
@settings(max_examples=120, deadline=None)
@given(
    cases().filter(more_than_one_element),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "relu"]),
    st.sampled_from(PADDING_MODES),
)
def test_kn_conv_agrees_with_equation_4(
    device, case: Case, p, training, with_bias, activation, mode
):
    _, stride, padding, dilation = case.geometry
    if mode in ("reflect", "circular") and any(
        a >= size for a, size in zip(padding, case.sizes, strict=True)
    ):
        mode = "replicate"
    x, (weight, bias) = case.input(device=device).requires_grad_(), case.filters(device=device)
    inputs = [x, weight.requires_grad_(), bias.requires_grad_()][: 3 if with_bias else 2]
    sides = [side for side in reversed(padding) for _ in range(2)]
    padded = x if mode == "zeros" else F.pad(x, sides, mode)
    mask = mask_of(case.seed, padded.shape, p, device) if training else None

    y = kn_conv(
        *(inputs if with_bias else [*inputs, None]), stride, padding, dilation, case.groups,
        padding_mode=mode, dropout_p=p, training=training, activation=activation,
        evaluation="plain",
    )  # fmt: skip
    none = [0] * case.d
    expected = reference.kn_conv(
        padded, weight, bias if with_bias else None, stride, padding if mode == "zeros" else none,
        dilation, case.groups, mask,
    )  # fmt: skip
    assert_same(y, expected.relu() if activation else expected, inputs)


@settings(max_examples=100, deadline=None)
@given(cases(dilated=False), st.sampled_from([0.0, 0.1, 0.5]), st.booleans())
def test_kernel_norm_agrees_with_equation_3(device, case: Case, p, training):
    kernel_size, stride, padding, dilation = case.geometry
    x = case.input(device=device).requires_grad_()
    mask = None
    if training:
        shape = reference.windows(x, kernel_size, stride, padding, dilation).movedim(1 + case.d, 1)
        drawn = x.shape if case.geometry.pointwise else shape.shape
        mask = mask_of(case.seed, drawn, p, device)
        mask = None if mask is None else mask.view(shape.shape)
        mask = None if mask is None else mask.movedim(1, 1 + case.d)
    y = kernel_norm(
        x, kernel_size, stride, padding, dropout_p=p, training=training, evaluation="plain"
    )
    assert_same(y, reference.kernel_norm(x, kernel_size, stride, padding, mask), [x])


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_same_padding_keeps_the_size(d, dilation, kernel_size, mode):
    x = torch.randn(2, 3, *[8, 7, 9][:d], dtype=torch.float64)
    weight = torch.randn(4, 3, *[kernel_size] * d, dtype=torch.float64)
    y = kn_conv(
        x, weight, None, 1, "same", dilation, padding_mode=mode, training=False, evaluation="plain"
    )
    total = dilation * (kernel_size - 1)
    pad = [total // 2, total - total // 2] * d
    padded = F.pad(x, pad, "constant" if mode == "zeros" else mode)
    none = [0] * d
    expected = reference.kn_conv(padded, weight, None, [1] * d, none, [dilation] * d, 1)
    assert y.shape[2:] == x.shape[2:]
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_valid_padding_is_none():
    x, weight = torch.randn(2, 3, 9, 8), torch.randn(4, 3, 3, 3)
    options = {"training": False}
    valid, zero = (kn_conv(x, weight, None, 2, p, **options) for p in ("valid", 0))
    torch.testing.assert_close(valid, zero, rtol=0, atol=0)


def gradient_case(device, d: int, groups: int, training: bool, activation: str | None, bias: bool):
    """A small layer as a function of its tensors, whose mask is the same in each call."""
    generator = torch.Generator().manual_seed(d + 10 * groups)
    sizes = [3, 2, 2][:d]

    def randn(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(device).requires_grad_()

    inputs = [randn(1, 2, *sizes), randn(2, 2 // groups, *[2] * d)] + [randn(2)] * bias

    def layer(x, weight, bias=None):
        torch.manual_seed(1)
        return kn_conv(
            x, weight, bias, 1, 1, 1, groups, dropout_p=0.3, training=training,
            activation=activation,
        )  # fmt: skip

    return layer, inputs


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("d", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_kn_conv_gradcheck(device, d, groups, training, activation):
    layer, inputs = gradient_case(device, d, groups, training, activation, bias=d != 1)
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("d", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_kn_conv_gradgradcheck(device, d, groups, training, activation):
    layer, inputs = gradient_case(device, d, groups, training, activation, bias=d != 1)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize("kernel_size", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_kernel_norm_gradcheck_and_gradgradcheck(device, kernel_size, training):
    def layer(x):
        torch.manual_seed(1)
        return kernel_norm(x, kernel_size, 1, dropout_p=0.3, training=training)

    x = torch.randn(1, 3, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.usefixtures("backend")
@settings(max_examples=40, deadline=None)
@given(cases())
def test_frozen_tensors_get_no_gradient_and_do_not_change_the_others(case: Case):
    _, stride, padding, dilation = case.geometry
    tensors = [case.input(), *case.filters()]
    full = [t.clone().requires_grad_() for t in tensors]
    torch.manual_seed(0)
    kn_conv(*full, stride, padding, dilation, case.groups).square().sum().backward()
    for kept in range(3):
        some = [t.clone().requires_grad_(i == kept) for i, t in enumerate(tensors)]
        torch.manual_seed(0)
        kn_conv(*some, stride, padding, dilation, case.groups).square().sum().backward()
        torch.testing.assert_close(some[kept].grad, full[kept].grad)
        assert all(t.grad is None for i, t in enumerate(some) if i != kept)


@pytest.mark.usefixtures("backend")
@settings(max_examples=30, deadline=None)
@given(cases())
def test_samples_do_not_see_each_other(case: Case):
    _, stride, padding, dilation = case.geometry
    x, (weight, bias) = case.input(), case.filters()
    layer = [weight, bias, stride, padding, dilation, case.groups]
    batch = kn_conv(x, *layer, training=False)
    for i in range(len(x)):
        alone = kn_conv(x[i : i + 1], *layer, training=False)
        torch.testing.assert_close(alone[0], batch[i], rtol=1e-12, atol=1e-12)
        unbatched = kn_conv(x[i], *layer, training=False)
        torch.testing.assert_close(unbatched, batch[i], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("backend")
@settings(max_examples=30, deadline=None)
@given(cases())
def test_memory_format_changes_neither_result_nor_mask(case: Case):
    _, stride, padding, dilation = case.geometry
    x, (weight, bias) = case.input().contiguous(), case.filters()
    outputs = []
    for form in (torch.contiguous_format, CHANNELS_LAST.get(case.d, torch.contiguous_format)):
        torch.manual_seed(3)
        y = kn_conv(
            x.contiguous(memory_format=form), weight, bias, stride, padding, dilation, case.groups
        )
        outputs.append(y)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


def test_channels_last_comes_out_as_it_went_in():
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = kn_conv(x, torch.randn(16, 8, 3, 3), torch.randn(16), padding=1, activation="relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_what_comes_next_may_change_the_output_in_place(training, bias):
    """As torchvision's networks do: an in-place ReLU, and a residual addition."""
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(4, dtype=torch.float64) if bias else None
    gradients = []
    for in_place in (True, False):
        torch.manual_seed(0)
        y = kn_conv(x, weight, shift, padding=1, training=training)
        if in_place:
            y += x
            y.relu_()
        else:
            y = (y + x).relu()
        gradients.append(torch.autograd.grad(y.square().sum(), [x, weight]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(training):
    x = torch.randn(0, 3, 8, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    y = kn_conv(x, weight, torch.randn(4), padding=1, training=training)
    assert y.shape == (0, 4, 8, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert kernel_norm(x, 3, 1, training=training).shape == (0, 3, 18, 18)


def test_backward_keeps_input_output_and_one_channel_maps():
    """Nothing of the input's or the output's size is kept but those two, once."""
    x = torch.randn(4, 32, 16, 16, requires_grad=True)
    weight, bias = (torch.randn(32, 32, 3, 3, requires_grad=True), torch.zeros(32))
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = kn_conv(x, weight, bias, padding=1, activation="relu")
    for t in (x, y, weight, bias):
        kept.pop(t.untyped_storage().data_ptr(), None)
    maps = 2 * 4 * 16 * 16 * 4
    keys = 4 * (32 + 4 * 16 + 16)
    assert sum(kept.values()) <= maps + keys + 4 * 32
