r"""KernelNorm with windows of one pixel, with the primitives of a KNConv.

With :math:`u` the channels of a pixel, :math:`y = (u - \mu) \, \text{rstd}`. That is a KNConv whose
convolution is the identity, so the statistics and the gradients are the backend's primitives.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernelnorm.ops import differentiable, observers
from kernelnorm.ops.backends import Statistics, backend_for, eager
from kernelnorm.ops.settings import Settings, constants

__all__ = ["pixel_norm"]


def pixel_norm(x: Tensor, keys: Tensor | None, settings: Settings) -> Tensor:
    """Normalise the channels of each pixel.

    Args:
        keys: of the dropout mask; given if and only if ``settings.masked``
    """
    if observers.needs_plain_operations(x, keys) or observers.is_observed():
        return _plain(x, keys, settings)
    y: Tensor = _PixelNorm.apply(x, keys, settings)  # type: ignore[no-untyped-call]
    return y


def _plain(x: Tensor, keys: Tensor | None, settings: Settings) -> Tensor:
    mu, rstd, *_ = eager.window_statistics(x, keys, settings, with_means=False)
    return (x - mu) * rstd


class _PixelNorm(torch.autograd.Function):
    """For the backward, keeps the input, the keys and two one-channel maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor | None, settings: Settings) -> Tensor:
        mu, rstd, *_ = backend_for(x).window_statistics(x, keys, settings, with_means=False)
        ctx.settings = settings
        ctx.save_for_backward(x, keys, mu, rstd)
        return (x - mu).mul_(rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, keys, mu, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated once more
            plain = partial(_plain, keys=keys, settings=ctx.settings)
            (grad_x,) = differentiable.gradients(plain, [x], grad)
            return grad_x, None, None
        backend = backend_for(x) if observers.has_storage(grad) else eager
        factors = constants(ctx.settings, x.shape[1])
        sums = mu.new_ones(x.shape[1])  # the sums of the filters of an identity
        grad_x, pair, _, _ = backend.epilogue_backward(
            grad, x - mu, Statistics(mu, rstd), sums, None, None,
            (factors.grad_mean, factors.grad_var),
        )  # fmt: skip
        return backend.statistics_backward(grad_x, x, pair, keys, ctx.settings), None, None
