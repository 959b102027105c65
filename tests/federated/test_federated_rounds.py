"""Rounds of the server with clients in this process: averages, failures, choice of clients."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.app import Error, Message
from flwr.serverapp import Grid
from kernelnorm_federated import task
from kernelnorm_federated.local import LocalGrid, run, run_config
from kernelnorm_federated.nodes import Nodes
from kernelnorm_federated.partitions import split
from kernelnorm_federated.server_app import serve
from kernelnorm_federated.settings import Settings
from kernelnorm_federated.state import RunState
from PIL import Image
from torch import Tensor

from kernelnorm.experiments.data import Images
from kernelnorm.norms import NORMS

Make = Callable[..., Settings]


def quiet(_: str) -> None:
    """Says nothing."""


def part(settings: Settings, client: int) -> Images:
    images = task.load(settings, "train")
    chosen = split(images.labels, settings)[client]
    return replace(images, pixels=images.pixels[chosen], labels=images.labels[chosen])


def trained_by_hand(
    settings: Settings, before: dict[str, Tensor], server_round: int, clients: Iterable[int]
) -> dict[str, Tensor]:
    """The average of the clients' networks, in float64."""
    states, sizes = [], []
    for client in clients:
        images = part(settings, client)
        network = task.build(settings, images)
        network.load_state_dict(before)
        task.train(network, images, settings, server_round=server_round, client=client)
        states.append(network.state_dict())
        sizes.append(len(images))
    return {
        name: sum(n * state[name].double() for n, state in zip(sizes, states, strict=True))
        / sum(sizes)
        for name in before
    }


def assert_near(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        wanted = expected[name] if tensor.dtype.is_floating_point else expected[name].round()
        torch.testing.assert_close(tensor.double(), wanted, atol=1e-6, rtol=1e-5)


def assert_equal(first: RunState, second: RunState) -> None:
    """Bit by bit; the times may differ."""
    assert all(first.network[name].equal(second.network[name]) for name in first.network)
    assert {*first.moments} == {*second.moments}
    for name, tensors in first.moments.items():
        assert all(tensors[key].equal(second.moments[name][key]) for key in tensors)
    histories = [[{**e, "seconds": 0} for e in state.history] for state in (first, second)]
    assert histories[0] == histories[1]


@dataclass
class Unreliable(LocalGrid):
    """A grid in which some clients fail in some rounds, and which answers in reverse order."""

    failing: dict[int, set[int]] = field(default_factory=dict)
    asked: list[tuple[int, int]] = field(default_factory=list)

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train":
            config = message.content["config"]
            self.asked.append((config["server-round"], config["client"]))
            if config["client"] in self.failing.get(config["server-round"], ()):
                return Message(Error(1, "out of memory"), reply_to=message)
        return super().answer(message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return [*super().send_and_receive(messages, timeout=timeout)][::-1]


def unreliable(settings: Settings, **options: Any) -> Unreliable:
    return Unreliable(run_config(settings), settings.clients, **options)


@pytest.mark.parametrize("norm", ["batch", "kernel"])
def test_a_round_gives_the_average_of_what_the_clients_trained(settings: Make, norm: str) -> None:
    choice = settings(norm=norm, partition="dirichlet", num_server_rounds=1)
    start = task.build(choice, part(choice, 0)).state_dict()
    state = run(choice, quiet)
    assert_near(state.network, trained_by_hand(choice, start, 1, range(3)))
    moved = [name for name in start if not state.network[name].equal(start[name])]
    assert moved == [*start]


def test_a_client_that_fails_is_left_out_and_the_run_goes_on(settings: Make) -> None:
    choice = settings(norm="batch", partition="dirichlet")
    lines: list[str] = []
    before = run(replace(choice, num_server_rounds=1, out=f"{choice.out}-1"), quiet).network
    after = serve(
        unreliable(replace(choice, num_server_rounds=2), failing={2: {1}}),
        replace(choice, num_server_rounds=2),
        lines.append,
    )
    assert_near(after.network, trained_by_hand(choice, before, 2, (0, 2)))
    assert [[*entry["images"]] for entry in after.history] == [["0", "1", "2"], ["0", "2"]]
    assert any("failed: out of memory" in line for line in lines)
    assert any("round 2/2" in line and "2 clients (without [1])" in line for line in lines)
    last = serve(unreliable(choice), choice, quiet)
    assert [*last.history[2]["images"]] == ["0", "1", "2"]


def test_the_order_of_the_answers_does_not_matter(settings: Make) -> None:
    choice = settings(norm="batch")
    reverse = replace(choice, out=f"{choice.out}-reverse")
    assert_equal(run(choice, quiet), serve(unreliable(reverse), reverse, quiet))


def test_two_supernodes_may_play_more_clients(settings: Make) -> None:
    choice = settings(clients=5)
    grid = Unreliable(run_config(choice), 2)
    state = serve(grid, replace(choice, out=f"{choice.out}-two"), quiet)
    assert {client for _, client in grid.asked} == {*range(5)}
    assert_equal(state, run(choice, quiet))


@dataclass
class Shrinking(Unreliable):
    """A grid whose last SuperNode goes after the first round."""

    def get_node_ids(self) -> Iterable[int]:
        gone = any(server_round > 1 for server_round, _ in self.asked) or len(self.asked) >= 3
        return range(1, self.nodes + (not gone))


def test_a_supernode_that_has_gone_is_not_asked(settings: Make) -> None:
    choice = settings()
    grid = Shrinking(run_config(choice), 3)
    lines: list[str] = []
    state = serve(grid, choice, lines.append)
    assert [[*entry["images"]] for entry in state.history] == [["0", "1", "2"], *[["0", "1"]] * 2]
    assert "(without [2])" in lines[-2]
    assert grid.asked[3:] == [(2, 0), (2, 1), (3, 0), (3, 1)]


def test_a_share_of_the_clients_trains_another_one_each_round(settings: Make) -> None:
    choice = settings(clients=9, fraction_train=0.34, num_server_rounds=4)
    asked = []
    for attempt in range(2):
        grid = unreliable(choice)
        serve(grid, replace(choice, out=f"{choice.out}-{attempt}"), quiet)
        asked.append(grid.asked)
    assert asked[0] == asked[1]
    rounds = [[client for number, client in asked[0] if number == r] for r in range(1, 5)]
    assert all(len(clients) == 3 for clients in rounds)
    assert len({*map(tuple, rounds)}) > 1


def test_a_round_without_answers_keeps_the_network_and_a_second_one_ends_the_run(
    settings: Make,
) -> None:
    choice = settings(num_server_rounds=4)
    grid = unreliable(choice, failing={2: {0, 1, 2}, 4: {0, 1, 2}})
    state = serve(grid, choice, quiet)
    first, second = state.history[:2]
    assert (second["accuracy"], second["images"]) == (first["accuracy"], {})
    assert len(state.history) == 4
    longer = replace(choice, num_server_rounds=6)
    with pytest.raises(RuntimeError, match="round 5: no client has answered"):
        serve(unreliable(longer, failing={5: {0, 1, 2}}), longer, quiet)
    assert len(run(longer, quiet).history) == 6


def test_a_run_ends_if_nobody_answers_in_its_first_round(settings: Make) -> None:
    choice = settings()
    with pytest.raises(RuntimeError, match="round 1: no client has answered"):
        serve(unreliable(choice, failing={1: {0, 1, 2}}), choice, quiet)


def test_a_run_without_supernodes_says_so() -> None:
    nodes = Nodes(cast(Grid, LocalGrid({}, 0)), quiet)
    with pytest.raises(TimeoutError, match=r"no SuperNode has answered in 0\.1 s"):
        nodes.wait(seconds=0.1, pause=0.05)


def test_the_last_supernode_counts_that_claims_a_place(run_config: dict[str, Any]) -> None:
    nodes = Nodes(cast(Grid, LocalGrid(run_config, 2)), quiet)
    nodes.wait()
    nodes.grid.nodes = 3  # one more comes, as one that was started again

    def node_config(node: int) -> dict[str, Any]:
        return {"partition-id": (node - 1) % 2, "num-partitions": 2}

    nodes.grid.node_config = node_config
    assert nodes.holders(4) == {0: 1, 1: 2, 2: 1, 3: 2}
    nodes.find()
    assert nodes.holders(4) == {0: 3, 1: 2, 2: 3, 3: 2}


def test_a_supernode_without_a_place_is_told(run_config: dict[str, Any]) -> None:
    grid, lines = LocalGrid(run_config, 1), list[str]()
    grid.node_config = lambda node: {}
    with pytest.raises(TimeoutError):
        Nodes(cast(Grid, grid), lines.append).wait(seconds=0.1, pause=0.05)
    assert "start it with --node-config 'partition-id=0 num-partitions=2'" in lines[0]


def test_a_client_that_diverges_says_so(settings: Make) -> None:
    choice = settings(norm="none", learning_rate=1e20, momentum=0.0)
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="no client has answered"):
        run(choice, lines.append)
    assert any("training diverged: the weights of client 0 in round 1" in line for line in lines)


@pytest.mark.parametrize("norm", [*NORMS, "fixbn"])
def test_every_norm_trains(settings: Make, norm: str) -> None:
    choice = settings(norm=norm, num_server_rounds=2, image_size=24)
    state = run(choice, quiet)
    assert all(math.isfinite(entry["loss"]) for entry in state.history)
    assert all(tensor.isfinite().all() for tensor in state.network.values())


@pytest.mark.parametrize(("model", "norm"), [("resnet18", "batch"), ("knresnet13", "kernel")])
def test_other_models_train(settings: Make, model: str, norm: str) -> None:
    choice = settings(model=model, norm=norm, clients=1, train_images=10, num_server_rounds=1)
    choice = replace(choice, image_size=32, test_images=10)
    assert [*run(choice, quiet).history[0]["images"]] == ["0"]


def statistics(network: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in network.items() if "running" in name or "tracked" in name}


def test_fixbn_freezes_the_statistics_and_trains_the_rest(settings: Make) -> None:
    choice = settings(norm="fixbn", num_server_rounds=4)
    lengths = {n: replace(choice, num_server_rounds=n, fixbn_round=3) for n in range(1, 5)}
    states = {n: run(setting, quiet).network for n, setting in lengths.items()}
    assert len(statistics(states[1])) == 15
    for name in statistics(states[1]):
        assert not states[1][name].equal(states[2][name]), name
        assert states[2][name].equal(states[3][name]), name
        assert states[3][name].equal(states[4][name]), name
    for name in {*states[1]} - {*statistics(states[1])}:
        assert not states[3][name].equal(states[4][name]), name
    batch = run(replace(choice, norm="batch", num_server_rounds=2, out=f"{choice.out}-b"), quiet)
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


def test_fedprox_without_its_term_is_fedavg(settings: Make) -> None:
    plain = settings()
    prox = replace(plain, strategy="fedprox", proximal_mu=0.0, out=f"{plain.out}-prox")
    assert_equal(run(plain, quiet), run(prox, quiet))


def make_photos(folder: Path, classes: str) -> Path:
    for name in ("train", "test"):
        for number, label in enumerate(classes):
            (folder / name / label).mkdir(parents=True)
            for i in range(12):
                shade = 80 * number + 5 * i
                image = Image.new("RGB", (16, 16), (shade, shade, 0))
                image.save(folder / name / label / f"{i}.png")
    return folder


@dataclass
class Owning(LocalGrid):
    """A grid whose SuperNodes have data of their own."""

    data: Path = Path()

    def node_config(self, node: int) -> dict[str, Any]:
        return {**super().node_config(node), "data": str(self.data)}


def test_a_supernode_trains_on_its_own_data(settings: Make, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", "abc")
    choice = settings(data=str(photos), clients=2, train_images=30, num_server_rounds=1)
    own = make_photos(tmp_path / "own", "abc")
    shutil.rmtree(own / "test")
    state = serve(Owning(run_config(choice), 2, data=own), choice, quiet)
    assert state.history[0]["images"] == {"0": 30, "1": 30}
    other = replace(choice, out=f"{choice.out}-parts")
    assert run(other, quiet).history[0]["images"] == {"0": 15, "1": 15}


def test_own_data_with_other_classes_are_refused(settings: Make, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", "abc")
    choice = settings(data=str(photos), clients=2, train_images=0)
    own = make_photos(tmp_path / "own", "abd")
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="no client has answered"):
        serve(Owning(run_config(choice), 2, data=own), choice, lines.append)
    message = "client 0 has the classes ['a', 'b', 'd'], the server ['a', 'b', 'c']"
    assert any(message in line for line in lines)


def test_the_network_of_a_run_is_a_plain_state_dict(settings: Make) -> None:
    choice = settings(num_server_rounds=1)
    run(choice, quiet)
    saved = torch.load(choice.folder / "state.pt", weights_only=True)
    network = task.build(choice, task.load(choice, "test"))
    network.load_state_dict(saved["network"])
    accuracy, _ = task.test(network, task.load(choice, "test"))
    assert accuracy == saved["history"][0]["accuracy"]
