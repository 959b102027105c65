"""What clients compute: every norm and model, FixBN, FedProx, clipping, divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from flwr.app import Message
from flwr.serverapp import Grid
from kernelnorm_federated import task
from kernelnorm_federated.local import LocalGrid, run, run_config
from kernelnorm_federated.server_app import serve
from kernelnorm_federated.settings import Settings
from test_federated_rounds import assert_equal, assert_near, part, quiet, trained_by_hand
from torch import Tensor

from kernelnorm.experiments.data import Preprocess, batches
from kernelnorm.norms import NORMS, adaptive_clip_grad_, clipped_parameters

Make = Callable[..., Settings]


def test_an_average_that_is_not_finite_ends_the_run_and_is_not_saved(settings: Make) -> None:
    choice = settings(norm="none", strategy="fedadam", num_server_rounds=1)
    first = run(choice, quiet)
    wrong = replace(choice, server_learning_rate=1e30, out=f"{choice.out}-wrong")
    with pytest.raises(ArithmeticError, match="Take a smaller server-learning-rate or learning-"):
        run(wrong, quiet)
    assert not (wrong.folder / "state.pt").exists()
    assert len(first.history) == 1


def test_a_client_that_diverges_says_so(settings: Make) -> None:
    choice = settings(norm="none", learning_rate=1e20, momentum=0.0)
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="no client has answered"):
        run(choice, lines.append)
    assert any("training diverged: the weights of client 0 in round 1" in line for line in lines)


@pytest.mark.parametrize("norm", [*NORMS, "fixbn"])
def test_every_norm_trains(settings: Make, norm: str) -> None:
    choice = settings(norm=norm, num_server_rounds=2, image_size=24)
    network = task.build(choice, part(choice, 0))
    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    state = run(choice, quiet)
    losses = [entry["loss"] for entry in state.history]
    assert losses[1] < losses[0] < math.inf
    assert all(tensor.isfinite().all() for tensor in state.network.values())
    assert [name for name in start if state.network[name].equal(start[name])] == []


@pytest.mark.parametrize(("model", "norm"), [("resnet18", "batch"), ("knresnet13", "kernel")])
def test_other_models_train(settings: Make, model: str, norm: str) -> None:
    choice = settings(model=model, norm=norm, clients=1, train_images=10, num_server_rounds=1)
    choice = replace(choice, image_size=32, test_images=10)
    assert [*run(choice, quiet).history[0]["images"]] == ["0"]


def statistics(network: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in network.items() if "running" in name or "tracked" in name}


@dataclass
class Recording(LocalGrid):
    """A grid that records the server's network after each round but the last."""

    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train":
            number = message.content["config"]["server-round"] - 1
            self.states[number] = message.content["arrays"].to_torch_state_dict()
        return super().answer(message)


def test_fixbn_freezes_the_statistics_and_trains_the_rest(settings: Make) -> None:
    choice = settings(norm="fixbn", num_server_rounds=4, fixbn_round=3)
    grid = Recording(run_config(choice), choice.clients)
    last = serve(cast(Grid, grid), choice, quiet).network
    states = {**grid.states, 4: last}
    assert len(statistics(states[1])) == 15
    for name in statistics(states[1]):
        assert not states[1][name].equal(states[2][name]), name
        assert states[2][name].equal(states[3][name]), name
        assert states[3][name].equal(states[4][name]), name
    for name in {*states[1]} - {*statistics(states[1])}:
        assert not states[3][name].equal(states[4][name]), name
    batch = run(settings(norm="batch", num_server_rounds=2, out=f"{choice.out}-b"), quiet)
    assert all(batch.network[name].equal(tensor) for name, tensor in states[2].items())


def test_frozen_statistics_are_those_that_training_normalises_by(settings: Make) -> None:
    network = task.build(settings(norm="fixbn"), part(settings(), 0))
    x = torch.randn(4, 1, 16, 16)
    network.train()
    trained = network(x)
    task.freeze_statistics(network)
    frozen = network(x)
    assert not torch.allclose(trained, frozen)
    torch.testing.assert_close(frozen, network.eval()(x), rtol=0, atol=0)


def test_fedprox_pulls_towards_the_servers_parameters(settings: Make) -> None:
    """Its gradient is mu (w - w_0), so the second step of SGD gives lr mu (w_1 - w_0) less."""
    rate, mu = 0.1, 0.7
    choice = settings(norm="none", momentum=0.0, learning_rate=rate, batch_size=30)
    images = part(choice, 0)  # 30, one step an epoch

    def trained(epochs: int, pull: float) -> list[Tensor]:
        network = task.build(choice, images)
        options = replace(choice, local_epochs=max(1, epochs))
        if epochs:
            task.train(network, images, options, server_round=1, client=0, proximal_mu=pull)
        return [parameter.detach() for parameter in network.parameters()]

    first = trained(1, 0.0)
    for start, one, two, pulled, pulled_one in zip(
        trained(0, 0.0), first, trained(2, 0.0), trained(2, mu), trained(1, mu), strict=True
    ):
        assert pulled_one.equal(one)
        expected = two - rate * mu * (one - start)
        torch.testing.assert_close(pulled, expected, atol=1e-7, rtol=1e-5)
        assert not torch.allclose(pulled, two, atol=1e-7, rtol=1e-5)


def test_the_proximal_term_reaches_the_clients(settings: Make) -> None:
    choice = settings(strategy="fedprox", proximal_mu=0.7, num_server_rounds=1, local_epochs=2)
    start = task.build(choice, part(choice, 0)).state_dict()
    state = run(choice, quiet)
    expected = trained_by_hand(choice, start, 1, range(3), proximal_mu=0.7)
    assert_near(state.network, expected)
    plain = trained_by_hand(choice, start, 1, range(3))
    assert not all(torch.allclose(state.network[name].double(), plain[name]) for name in plain)


@pytest.mark.parametrize("clips", [True, False])
def test_clients_clip_gradients_where_the_norm_needs_it(
    settings: Make, monkeypatch: pytest.MonkeyPatch, clips: bool
) -> None:
    choice = settings(norm="nf", momentum=0.0, batch_size=30, learning_rate=1.0)
    images = part(choice, 0)  # 30, one step
    ours, expected = (task.build(choice, images) for _ in range(2))
    if not clips:
        monkeypatch.setattr(task, "adaptive_clip_grad_", lambda parameters: None)
    task.train(ours, images, choice, server_round=1, client=0)
    x, y = next(batches(images, 30, train=False, preprocess=Preprocess((0.5,), (0.25,))))
    F.cross_entropy(expected.train()(x), y).backward()
    adaptive_clip_grad_(clipped_parameters(expected))
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= parameter.grad
    near = [
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(ours.parameters(), expected.parameters(), strict=True)
    ]
    assert all(near) == clips


def test_fedprox_without_its_term_is_fedavg(settings: Make) -> None:
    plain = settings()
    prox = replace(plain, strategy="fedprox", proximal_mu=0.0, out=f"{plain.out}-prox")
    assert_equal(run(plain, quiet), run(prox, quiet))
