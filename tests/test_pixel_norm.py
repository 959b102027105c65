"""KernelNorm with windows of one pixel, on all backends, against Equation 3 in float64."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelnorm import KernelNorm2d, reference
from kernelnorm.functional import kernel_norm
from kernelnorm.ops import pixel_norm
from kernelnorm.ops.backends import eager
from kernelnorm.ops.windows import Geometry
from tests.strategies import EXPANDED, LAYOUTS, Case, cases, laid_out, mask_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 0.01
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@settings(max_examples=100, deadline=None)
@given(
    cases(wide=True),
    st.sampled_from([*TOLERANCES]),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
    st.sampled_from(LAYOUTS + EXPANDED),
)
def test_agrees_with_equation_3(
    device: torch.device, case: Case, dtype: torch.dtype, p: float, training: bool, layout: str
):
    ones = (1,) * case.d
    case = replace(case, geometry=Geometry(ones, ones, (0,) * case.d, ones))
    if dtype != torch.float64 and case.in_channels < 16:  # whose variance is mostly rounding
        case = replace(case, in_channels=16)
    x = case.input(dtype, device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    mask = mask_of(case.seed, x.shape, p, device) if training else None
    if mask is not None:
        windows = reference.windows(exact, *case.geometry)
        mask = mask.movedim(1, 1 + case.d).reshape(windows.shape)
    y = kernel_norm(x, ones, dropout_p=p, training=training, eps=EPS, evaluation="plain")
    expected = reference.kernel_norm(exact, ones, ones, (0,) * case.d, mask, EPS)
    grad = laid_out(case.gradient(y), layout)
    (gradient,) = torch.autograd.grad(y, x, grad)
    (exact_gradient,) = torch.autograd.grad(expected, exact, grad.double())
    for a, b in ((y, expected), (gradient, exact_gradient)):
        assert a.dtype == dtype
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            a.double(), b, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * scale
        )


def test_empty_batches_and_unbatched_inputs():
    layer = KernelNorm2d(1)
    empty = torch.randn(0, 3, 4, 4, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape
    x = torch.randn(3, 4, 4)
    torch.testing.assert_close(layer.eval()(x), layer(x[None])[0])


def test_keeps_the_input_alone():
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    x = torch.randn(2, 64, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = KernelNorm2d(1)(x)
    assert x.untyped_storage().data_ptr() in kept
    assert y.untyped_storage().data_ptr() not in kept
    assert len(kept) <= 4  # the input, its keys, mean and rstd


def test_eager_backend_and_kernels_have_the_same_mask():
    x, layer = torch.randn(2, 16, 8, 8), KernelNorm2d(1, dropout_p=0.5)
    if pixel_norm.backend_for(x) is eager:
        pytest.skip("the installation has no C kernels")
    outputs = []
    for one in (pixel_norm.backend_for, lambda x: eager):
        with mock.patch.object(pixel_norm, "backend_for", one):
            torch.manual_seed(0)
            outputs.append(layer(x))
    torch.testing.assert_close(*outputs)
