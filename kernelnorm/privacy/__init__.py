"""Differentially private training of kernel networks with Opacus; needs ``kernelnorm[private]``.

- :class:`PrivacyEngine` is Opacus' engine with one more mode, ``grad_sample_mode="bookkeeping"``,
  its default. This mode computes the clipped gradients in about the time of an ordinary step.
- With :class:`opacus.PrivacyEngine`, kernel networks train in the modes ``"hooks"`` and
  ``"ghost"``. The samplers for KNConv are registered when this package is imported, or when Opacus
  registers its hooks on the first KNConv.

KernelNorm has no parameters and needs no sampler. All modes use the dropout masks of the forward
pass.
"""

from kernelnorm.privacy import samplers  # which registers them
from kernelnorm.privacy.engine import PrivacyEngine

__all__ = ["PrivacyEngine", "samplers"]
