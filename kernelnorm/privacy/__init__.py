"""Differentially private training of kernel networks with Opacus; needs ``kernelnorm[private]``.

- :class:`PrivacyEngine` is Opacus', with one more way to the clipped gradients,
  ``grad_sample_mode="bookkeeping"``, in about the time of an ordinary step.
- With :class:`opacus.PrivacyEngine`, kernel networks train in the modes ``"hooks"`` and
  ``"ghost"``. Its samplers for KNConv are registered when this package is imported, or when Opacus
  comes to the first KNConv.

KernelNorm has no parameters and needs nothing. Both ways use the dropout masks of the forward pass.
"""

from kernelnorm.privacy import samplers  # which registers them
from kernelnorm.privacy.engine import PrivacyEngine

__all__ = ["PrivacyEngine", "samplers"]
