r"""The backward pass of Weight Standardization.

Filters :math:`\hat w = r (w - \bar w)` of :math:`n` elements, with
:math:`r = (\mathrm{var}(w) + \epsilon)^{-1/2}`, pass their gradient :math:`g` on to the weight as

.. math::
    r \left(g - \bar g - \frac{(\hat w \cdot g)}{n} \hat w\right)

with means over the elements of a filter. The squared norm of this gradient is

.. math::
    r^2 \left(\|g\|^2 - n \bar g^2
        - \frac{2 - \|\hat w\|^2 / n}{n} (\hat w \cdot g)^2\right)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernelnorm.norms import WSConv2d


class Standardisation(NamedTuple):
    """Standardised filters, and the backward pass from their gradients to the weight's.

    Args:
        filters: shape :math:`(K, C / groups, *)`
        scale: the factor :math:`r` of each filter, shape :math:`(K, 1, 1, 1)`
    """

    filters: Tensor
    scale: Tensor

    def back_(self, gradients: Tensor) -> Tensor:
        """Turn gradients of the filters into gradients of the weight, in place.

        Shape:
            - gradients, Output: :math:`(N, K, C / groups, *)`
        """
        filters, scale = self.filters.flatten(1).to(gradients.dtype), self.scale.flatten(1)
        flat = gradients.flatten(2)
        along = (flat * filters).mean(2, keepdim=True)
        flat -= flat.mean(2, keepdim=True)
        flat -= along * filters
        flat *= scale.to(flat.dtype)
        return flat.view_as(gradients)


def standardisation(layer: WSConv2d) -> Standardisation:
    """The standardisation of a layer's weight, in float32 or more."""
    weight = layer.weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    scale = layer.scale_of(variance)
    return Standardisation((weight - mean) * scale, scale)
