"""The ways of evaluating a layer that was trained with dropout."""

from __future__ import annotations

import pytest
import torch

from kernelnorm.functional import kernel_norm, kn_conv
from kernelnorm.ops.mask import draw_keys, expand_keys, keep, rounded_p

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_expected_variance_is_the_mean_over_masks(p):
    """E[var(m u)], estimated with many masks, against the closed form that evaluation uses."""
    u = torch.randn(1, 6, 3, 3, dtype=torch.float64) + 1
    weight = torch.randn(1, 6, 3, 3, dtype=torch.float64)
    shape = (200_000, u.numel())
    masks = keep(expand_keys(draw_keys(shape, CPU), shape, p), u.dtype) / (1 - rounded_p(p))
    variances = (masks * u.flatten()).var(1, correction=0)
    var, error = variances.mean(), variances.std() / len(variances) ** 0.5
    y = kn_conv(u, weight, dropout_p=p, training=False, eps=1e-12)
    numerator = ((u - u.mean()) * weight).sum()
    assert abs((numerator / y) ** 2 - var).item() < 5 * error
    # The plain variance is another number altogether.
    assert abs(u.var(correction=0) - var) > 20 * error
    y = kernel_norm(u, 3, dropout_p=p, training=False, eps=1e-12)
    assert abs(((u - u.mean()) / y)[0, 0, 0, 0] ** 2 - var).item() < 5 * error


def test_evaluation_modes():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)

    def run(training, evaluation, seed):
        torch.manual_seed(seed)
        return kn_conv(x, weight, training=training, evaluation=evaluation)

    for deterministic in ("expected", "plain"):
        assert torch.equal(run(False, deterministic, 0), run(False, deterministic, 1))
    assert torch.equal(run(False, "monte_carlo", 0), run(True, "expected", 0))
    assert not torch.equal(run(False, "monte_carlo", 0), run(False, "monte_carlo", 1))
    assert not torch.allclose(run(False, "expected", 0), run(False, "plain", 0), rtol=1e-2)
