"""The options of private training: the privacy budget, clipping, augmentation and averaging."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from kernelnorm.experiments.errors import RunError
from kernelnorm.norms import describe

__all__ = ["Privacy", "rounded_up"]


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """How a run is trained with differential privacy, by DP-SGD.

    Args:
        epsilon: the budget, which is an upper bound for all steps of the run together.
        delta: delta of the (epsilon, delta) guarantee; below 1 / number of images.
        max_grad_norm: the norm to which the gradient of each sample is clipped.
        augmentations: augmented views of a sample in a step. Its gradient is their mean, and is
            clipped once (`De et al., 2022 <https://arxiv.org/abs/2204.13650>`_).
        ema: decay of an exponential moving average of the weights. The averaged weights are then
            tested and saved for use; ``None``: no average.
        micro_batch_size: the most views in one forward pass; ``None``: the whole batch.
        secure_mode: draw noise and batches from a cryptographically secure generator in place of
            the seed; needs torchcsprng.

    Raises:
        RunError: a value is out of its range.
    """

    epsilon: float = 8.0
    delta: float = 1e-5
    max_grad_norm: float = 1.0
    augmentations: int = 1
    ema: float | None = None
    micro_batch_size: int | None = None
    secure_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("epsilon", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RunError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("delta", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise RunError(f"{name} must be between 0 and 1, got {value}")
        for name in ("augmentations", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"{name} must be at least 1, got {value}")

        views, most = self.augmentations, self.micro_batch_size
        if most is not None and most < views:
            raise RunError(
                f"micro_batch_size must be at least the {views} augmentations of a sample, which "
                f"go through the network together, got {most}"
            )

    def __str__(self) -> str:
        own = [
            f"epsilon {self.epsilon:g} at delta {self.delta:g}",
            f"clipping norm {self.max_grad_norm:g}",
            f"{self.augmentations} augmentations" * (self.augmentations > 1),
            f"weights averaged with decay {self.ema}" * (self.ema is not None),
        ]
        return ", ".join(filter(None, own))

    @property
    def changes(self) -> dict[str, Any]:
        """The options that differ from their default values."""
        defaults = asdict(type(self)())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    def check(self, *, norm: str, precision: str, augment: bool) -> None:
        """Check that a run's other options allow private training.

        Raises:
            RunError: they do not.
        """
        if describe(norm).group == "batch-dependent":
            raise RunError(
                f"norm {norm} cannot be trained privately: it mixes the samples of a batch, so "
                "that none has a gradient of its own to be clipped. Choose another, such as kernel "
                "or group"
            )
        if precision != "32-true":
            raise RunError(
                f"private training needs precision 32-true, got {precision}, whose rounding could "
                "make a clipped gradient longer than its bound"
            )
        if self.augmentations > 1 and not augment:
            raise RunError(
                f"{self.augmentations} augmentations of a sample would be the same image: add "
                "--augment true"
            )


def rounded_up(epsilon: float) -> str:
    """Return an epsilon with two decimals; it is an upper bound, so it is rounded up."""
    return f"{math.ceil(100 * epsilon - 1e-9) / 100:.2f}" if epsilon < math.inf else "inf"
