"""Privacy accounting by Opacus: epsilon after some steps, and the noise for a budget."""

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
"""The orders of divergence in the search for a noise: few fractions, which take long to compute."""

ORDERS = sorted({*RDPAccountant.DEFAULT_ALPHAS, *_SEARCHED})
"""Each order gives a bound, and epsilon is the least: more of them than in the search can only
lower it."""


class Account:
    """Opacus' RDP accountant of a run whose steps are all alike, with a quick look at epsilon.

    Args:
        noise: the noise multiplier.
        rate: the sampling rate.
        delta: of the guarantee.
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
        """Return what the steps so far have spent, and ``more`` steps with them.

        Divergences of steps add up, so this is what the accountant's ``get_epsilon`` computes with
        the orders here.
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
        """Take up the accountant's state.

        Raises:
            ValueError: its steps were others than the run's.
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
    """Return the least noise, up to Opacus' tolerance, with which the steps keep to the budget.

    Raises:
        RunError: there is none.
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
