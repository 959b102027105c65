"""The server's next network is the average that one computes by hand, buffers included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from kernelnorm_federated.aggregation import aggregate, make_strategy, moments, restore_moments
from kernelnorm_federated.local import LocalGrid
from kernelnorm_federated.server_app import Sampled
from kernelnorm_federated.settings import Settings
from torch import Tensor, nn

Make = Callable[..., Settings]
IMAGES = (30, 10, 25)


def network(seed: int) -> nn.Module:
    """A layer with a BatchNorm, whose buffers are what some training left."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    for _ in range(seed + 1):
        module(torch.randn(4, 2, 5, 5) * (seed + 1) + seed)
    return module


def replies(states: list[dict[str, Tensor]]) -> list[Message]:
    question = Message(RecordDict(), 1, "train")
    return [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord(state),
                    "metrics": MetricRecord({"num-examples": images, "train-loss": float(images)}),
                    "config": ConfigRecord({"client": client}),
                }
            ),
            reply_to=question,
        )
        for client, (state, images) in enumerate(zip(states, IMAGES, strict=True))
    ]


def configured(settings: Settings, state: dict[str, Tensor]) -> FedAvg:
    LocalGrid({}, 1)  # makes Flower's messages possible
    strategy = make_strategy(settings)
    strategy.configure_train(1, ArrayRecord(state), ConfigRecord(), Sampled([1]))
    return strategy


STATES = [{name: t.detach() for name, t in network(seed).state_dict().items()} for seed in range(3)]
BUFFERS = {name for name, _ in network(0).named_buffers()}


def by_hand(name: str) -> Tensor:
    total = sum(images * state[name].double() for images, state in zip(IMAGES, STATES, strict=True))
    return total / sum(IMAGES)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_the_average_is_weighted_by_images_and_takes_the_buffers_in(
    settings: Make, strategy: str
) -> None:
    new, loss = aggregate(
        configured(settings(strategy=strategy), STATES[0]), 1, replies(STATES), STATES[0], BUFFERS
    )
    assert {*new} == {*STATES[0]}
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} == BUFFERS
    for name, tensor in new.items():
        assert tensor.dtype == STATES[0][name].dtype
        expected = by_hand(name)
        if name.endswith("num_batches_tracked"):
            assert tensor == expected.round() == 2  # of 1, 2 and 3, weighted: 1.92
        else:
            torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6)
    assert loss == pytest.approx(sum(n * n for n in IMAGES) / sum(IMAGES))


def test_fedadam_moves_the_parameters_and_averages_the_buffers(settings: Make) -> None:
    """Reddi et al., with Flower's bias correction; tau = 1e-3, betas 0.9 and 0.99."""
    eta = 0.05
    strategy = configured(settings(strategy="fedadam", server_learning_rate=eta), STATES[0])
    new, _ = aggregate(strategy, 1, replies(STATES), STATES[0], BUFFERS)
    for name, tensor in new.items():
        before, mean = STATES[0][name].double(), by_hand(name)
        if name in BUFFERS:
            expected = mean if tensor.dtype.is_floating_point else mean.round()
        else:
            delta = mean - before
            step = eta * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
            expected = before + step * 0.1 * delta / ((0.01 * delta**2).sqrt() + 1e-3)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-5)


def test_moments_survive_being_saved(settings: Make, tmp_path: Path) -> None:
    choice = settings(strategy="fedadam")
    strategy = configured(choice, STATES[0])
    aggregate(strategy, 1, replies(STATES), STATES[0], BUFFERS)
    torch.save(moments(strategy), tmp_path / "moments.pt")
    other = configured(choice, STATES[0])
    restore_moments(other, torch.load(tmp_path / "moments.pt", weights_only=True))
    first, second = (
        aggregate(each, 2, replies(STATES), STATES[0], BUFFERS)[0] for each in (strategy, other)
    )
    assert all(first[name].equal(second[name]) for name in first)
    first, second = (moments(s) for s in (strategy, other))
    assert {*first} == {"m_t", "v_t"} == {*second}
    for name, tensors in first.items():
        assert all(tensors[key].equal(second[name][key]) for key in tensors)


def test_fedavg_has_no_moments(settings: Make) -> None:
    strategy = configured(settings(), STATES[0])
    aggregate(strategy, 1, replies(STATES), STATES[0], BUFFERS)
    assert moments(strategy) == {}
