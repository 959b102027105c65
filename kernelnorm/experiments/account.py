"""Privacy accounting by Opacus: epsilon of a number of steps, noise multiplier of a budget."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

from opacus.accountants import RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from opacus.accountants.utils import get_noise_multiplier

from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.private_options import Privacy

__all__ = ["ORDERS", "Account", "noise_multiplier"]

_SEARCHED = [1.25, 1.5, 1.75, 2.25, 2.5, 2.75, 3.5, 4.5, 5.5, *range(2, 64)]
_SEARCHED += [80, 96, 128, 192, 256, 384, 512]
"""Orders of the Renyi divergence in the noise search. Few are fractions: these are slow. The large
ones are for budgets far below 1."""

ORDERS = sorted({*RDPAccountant.DEFAULT_ALPHAS, *_SEARCHED})
"""Orders for the reported epsilon, which is the smallest bound over all orders. More orders than
in the search can only lower it."""


class Account:
    """Opacus' RDP accountant of a run whose steps all have the same noise and sampling rate.

    Args:
        noise: the noise multiplier.
        rate: the sampling rate.
        delta: delta of the (epsilon, delta) guarantee.
    """

    def __init__(self, noise: float, rate: float, delta: float) -> None:
        self.accountant, self.delta = RDPAccountant(), delta
        self.noise, self.rate = noise, rate
        self._per_step = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS)

    @property
    def steps(self) -> int:
        """The number of steps that were taken."""
        return sum(steps for _, _, steps in self.accountant.history)

    def epsilon(self, more: int = 0) -> float:
        """Return the epsilon of the steps so far and ``more`` further steps.

        The divergences of steps add up, so the accountant's ``get_epsilon`` returns the same with
        :data:`ORDERS`, but more slowly.
        """
        steps = self.steps + more
        if not steps:
            return 0.0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Optimal order is the")  # the bound is valid
            epsilon, _ = get_privacy_spent(
                orders=ORDERS, rdp=self._per_step * steps, delta=self.delta
            )
        return float(epsilon)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the accountant's state.

        Raises:
            ValueError: it has steps with another noise multiplier or sampling rate.
        """
        others = [step for *step, _ in state["history"] if step != [self.noise, self.rate]]
        if others:
            raise ValueError(
                f"its steps had noise multiplier and sampling rate {others[0]}, not "
                f"{[self.noise, self.rate]}"
            )
        self.accountant.load_state_dict(dict(state))


@cache
def noise_multiplier(privacy: Privacy, rate: float, steps: int) -> float:
    """Return the smallest noise multiplier that keeps the steps within the budget.

    The epsilon of the result is below the budget by at most 0.01, or 1 % of the budget if less.

    Raises:
        RunError: no noise multiplier keeps to the budget.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the")
        try:
            noise: float = get_noise_multiplier(
                target_epsilon=privacy.epsilon,
                target_delta=privacy.delta,
                sample_rate=rate,
                steps=steps,
                accountant=RDPAccountant.mechanism(),
                alphas=_SEARCHED,
                epsilon_tolerance=min(0.01, privacy.epsilon / 100),
            )
        except ValueError as error:
            raise RunError(
                f"no noise keeps {steps} steps to epsilon {privacy.epsilon:g} at delta "
                f"{privacy.delta:g}: choose a larger --epsilon or --delta, or fewer --epochs"
            ) from error
    return noise
