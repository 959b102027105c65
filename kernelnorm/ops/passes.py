r"""The forward and the backward pass of a KNConv, in the primitives of a backend (Equation 5).

With :math:`u` a window of the input, :math:`n` its number of elements, :math:`m` the dropout mask,
:math:`u' = m u`, and :math:`S_k` the sum of the weights of filter :math:`k`:

.. math::
    \mu = \text{mean}(u') \qquad
    V = \text{mean}(u'^2) - \mu^2 \qquad
    \text{rstd} = (V + \kappa (V + \mu^2) + \epsilon)^{-1/2} \qquad
    y_k = \text{act}((\langle u, W_k \rangle - \mu S_k) \, \text{rstd} + b_k)

:math:`\kappa` is zero where a mask is drawn and where dropout is off. Otherwise it stands for the
variance that a mask would give on average, see :func:`kernelnorm.ops.mask.dropout_variance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from kernelnorm.ops import observers
from kernelnorm.ops.backends import Backend, Statistics, backend_for, compute_dtype, eager
from kernelnorm.ops.settings import Settings, constants

_LEAST_P = 1e-3
r"""The smallest dropout probability for which float32 filters need no centring:
:math:`|\mu| \, \text{rstd}` is below :math:`\kappa^{-1/2}`, about :math:`p^{-1/2}`."""


class Forward(NamedTuple):
    """The output of a forward pass, and what its backward pass needs.

    With an activation, ``numerator`` is ``None``, since the backward pass can compute it from
    ``y``. Without an activation, the caller may change ``y`` in place, as a residual addition does.
    """

    y: Tensor
    numerator: Tensor | None
    mu: Tensor
    rstd: Tensor
    filter_sums: Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    settings: Settings,
    backend: Backend | None = None,
) -> Forward:
    """The forward pass, by default with the primitives of the backend for ``x``."""
    if backend is None:
        backend = backend_for(x)
    dtype = compute_dtype(x)
    # <u, W> - mu S can be the difference of two large numbers, unless the filters are centred; the
    # small sums that rounding leaves of centred filters are then subtracted. In float32 and float64
    # there are two cases that need no centring: a mask moves mu by far more than rounding does, and
    # the expected variance in evaluation keeps |mu| rstd small.
    harmless = x.dtype == dtype and (settings.masked or settings.p >= _LEAST_P)
    # A centred filter needs two terms if the plain mean of the elements under it is not mu.
    apart = settings.masked or settings.groups > 1
    centred = not harmless or (backend.centres_filters and not apart)
    statistics = backend.window_statistics(x, keys, settings, centred and apart)
    elements = tuple(range(1, weight.dim()))
    if centred:
        means = weight.mean(elements, keepdim=True, dtype=dtype)
        sums = means.flatten() * weight[0].numel()
        filters = (weight - means).to(x.dtype)
        terms = []
        if not harmless:
            left = filters.sum(elements, dtype=dtype)  # by rounding
            terms = [(statistics.mu, left)]
            if statistics.offset is not None and statistics.means is not None:
                terms = [(statistics.offset, sums), (statistics.means, left)]
    else:
        sums = weight.sum(elements, dtype=dtype)
        filters, terms = weight, [(statistics.mu, sums)]
    z = backend.convolution(x, filters, settings)
    y, numerator = backend.epilogue(z, terms, statistics.rstd, bias, settings.slope)
    return Forward(y, numerator, statistics.mu, statistics.rstd, sums)


Receiver = Callable[[Tensor, Tensor, Tensor, Tensor, Settings], None]
r"""Gets the input, the numerator's gradient, mu, rstd and the settings of a call in its backward.

The weight's gradient is the sum over all windows :math:`u` of
:math:`\text{grad\_z}_k (u - \mu)`, that of the bias the sum of
:math:`\text{grad\_z}_k / \text{rstd}`; private training needs these for each sample.
"""


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    saved: Sequence[Tensor],
    settings: Settings,
    needs: Sequence[bool],
    receive: Receiver | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the input, the weight and the bias, each ``None`` if not needed.

    Args:
        saved: the numerator or, with an activation, the output; then mu, rstd and filter sums
        receive: called instead of computing the gradients of the weight and the bias
    """
    kept, mu, rstd, sums = saved
    needs_x, needs_weight, needs_bias = needs
    backend = backend_for(x) if observers.has_storage(grad) else eager
    factors = constants(settings, x.shape[1])
    grad_z, pair, grad_bias, grad_sums = backend.epilogue_backward(
        grad, kept, Statistics(mu, rstd), sums, bias, settings.slope,
        (factors.grad_mean, factors.grad_var),
    )  # fmt: skip
    if receive is not None:
        receive(x, grad_z, mu, rstd, settings)
        needs_weight = needs_bias = False
        if not needs_x:
            return None, None, None
    filters = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    grad_x, grad_weight = backend.convolution_backward(
        grad_z, x, filters, mu, grad_sums, settings, (needs_x, needs_weight)
    )
    if grad_x is not None:
        grad_x = backend.statistics_backward(grad_x, x, pair, keys, settings)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return (
        grad_x,
        grad_weight,
        grad_bias.to(bias.dtype) if needs_bias and bias is not None else None,
    )
