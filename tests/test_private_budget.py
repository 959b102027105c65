"""The budget of a private run: the noise that keeps to it, what is spent, and when it ends."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

pytest.importorskip("opacus")

from opacus.accountants import RDPAccountant

from kernelnorm.experiments import account, private_steps
from kernelnorm.experiments.account import Account, noise_multiplier
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.private_options import Privacy, rounded_up
from kernelnorm.experiments.trainer import train
from tests.private_runs import PER_EPOCH, images_of, known, small, steps_of


@pytest.mark.parametrize("epsilon", [0.5, 50.0])
@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_the_least_noise_keeps_to_the_budget(epsilon: float) -> None:
    noise = noise_multiplier(Privacy(epsilon=epsilon), 0.25, 8)
    reference = RDPAccountant()
    reference.history = [(noise, 0.25, 8)]
    assert 0.97 * epsilon < reference.get_epsilon(1e-5, alphas=account.ORDERS) <= epsilon
    spent = Account(noise, 0.25, 1e-5)
    assert spent.epsilon() == 0
    assert spent.epsilon(more=8) == reference.get_epsilon(1e-5, alphas=account.ORDERS)
    for _ in range(5):
        spent.accountant.step(noise_multiplier=noise, sample_rate=0.25)
    reference.history = [(noise, 0.25, 5)]
    assert spent.epsilon() == reference.get_epsilon(1e-5, alphas=account.ORDERS)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(12.0, 64 / 1437, 90), (16.0, 128 / 1437, 220)]
)
def test_the_last_step_is_within_the_budget(epsilon: float, rate: float, steps: int) -> None:
    """The search for a noise has orders that the accountant's own list lacks."""
    noise = noise_multiplier(Privacy(epsilon=epsilon), rate, steps)
    assert Account(noise, rate, 1e-5).epsilon(more=steps) <= epsilon


@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_a_run_spends_its_budget_and_not_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(small(epsilon=3.0), Launch(out=tmp_path))
    out = capsys.readouterr().out
    assert "private: epsilon 3 at delta 1e-05, clipping norm 1" in out
    found = folder.read_config()["privacy"]
    assert (found["steps"], found["sampling_rate"]) == (2 * PER_EPOCH, 16 / 60)
    history = folder.read_metrics()
    reference = RDPAccountant()
    for epoch, metrics in enumerate(history, 1):
        reference.history = [(found["noise_multiplier"], 16 / 60, epoch * PER_EPOCH)]
        assert metrics["epsilon"] == reference.get_epsilon(1e-5, alphas=account.ORDERS)
        assert f"epsilon {rounded_up(metrics['epsilon'])}" in out
    assert 2.9 < history[-1]["epsilon"] <= 3.0
    state = folder.load("last.ckpt")
    assert state is not None
    assert state["accountant"]["history"] == [(found["noise_multiplier"], 16 / 60, 2 * PER_EPOCH)]


@known
def test_a_step_beyond_the_budget_is_not_taken() -> None:
    steps = steps_of(small(epsilon=2.5, batch_size=6), images_of())
    batches = ((epoch, step) for epoch in range(100) for step in range(steps.per_epoch))
    while steps.account.epsilon(more=1) <= 2.5:
        steps.optimizer.noise_multiplier = 2.0  # as the account knows it
        steps.take(private_steps.Batch(*next(batches)))
    taken, before = steps.account.steps, deepcopy(steps.network.state_dict())
    assert taken > 0
    with pytest.raises(RunError, match=r"budget is spent: \d+ steps have .* above --epsilon 2.5"):
        steps.take(private_steps.Batch(*next(batches)))
    assert steps.account.steps == taken
    assert steps.account.epsilon() <= 2.5
    assert all(torch.equal(x, before[name]) for name, x in steps.network.state_dict().items())
