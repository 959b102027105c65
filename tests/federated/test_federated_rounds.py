"""Rounds of the server with clients in this process: averages, failures, choice of clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from kernelnorm_federated import task
from kernelnorm_federated.local import LocalGrid, run, run_config
from kernelnorm_federated.partitions import split
from kernelnorm_federated.server_app import serve
from kernelnorm_federated.settings import Settings
from kernelnorm_federated.state import RunState
from PIL import Image
from torch import Tensor

from kernelnorm.experiments.data import Images

Make = Callable[..., Settings]


def quiet(_: str) -> None:
    """Says nothing."""


def part(settings: Settings, client: int) -> Images:
    images = task.load(settings, "train")
    chosen = split(images.labels, settings)[client]
    return replace(images, pixels=images.pixels[chosen], labels=images.labels[chosen])


def trained_by_hand(
    settings: Settings,
    before: dict[str, Tensor],
    server_round: int,
    clients: Iterable[int],
    proximal_mu: float = 0.0,
) -> dict[str, Tensor]:
    """The average of the clients' networks, in float64."""
    states, sizes = [], []
    for client in clients:
        images = part(settings, client)
        network = task.build(settings, images)
        network.load_state_dict(before)
        task.train(
            network,
            images,
            settings,
            server_round=server_round,
            client=client,
            proximal_mu=proximal_mu,
        )
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


def test_images_that_the_network_cannot_take_are_refused_before_training(settings: Make) -> None:
    lines: list[str] = []
    with pytest.raises(ValueError, match="image-size=6: expected larger images than 6x6 for vgg8"):
        run(settings(image_size=6), lines.append)
    assert not lines


def test_a_folder_that_is_a_file_is_refused(settings: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out='.*file': expected a folder to write to"):
        run(settings(out=str(tmp_path / "file")), quiet)


def test_the_server_tests_on_images_that_no_client_has(settings: Make) -> None:
    choice = settings(test_on="held-out", train_images=90, test_images=40)
    held_out, own = task.load(choice, "test"), task.load(choice, "train")
    assert (len(held_out), len(own)) == (40, 90)
    assert held_out.labels.bincount().tolist() == [4] * 10
    everything = task.load(replace(choice, test_on="test", train_images=0), "train")
    taken = {image.numpy().tobytes() for image in own.pixels}
    others = {image.numpy().tobytes() for image in held_out.pixels}
    assert not taken & others
    assert others <= {image.numpy().tobytes() for image in everything.pixels}
    with pytest.raises(ValueError, match=r"train-images=5000: expected fewer than all 1442"):
        run(replace(choice, train_images=5000), quiet)


def make_photos(folder: Path, classes: str, train: int = 12) -> Path:
    for name, count in (("train", train), ("test", 12)):
        for number, label in enumerate(classes):
            (folder / name / label).mkdir(parents=True)
            for i in range(count):
                shade = 80 * number + 5 * i
                image = Image.new("RGB", (16, 16), (shade, shade, 0))
                image.save(folder / name / label / f"{i}.png")
    return folder


def test_the_network_of_a_run_is_a_plain_state_dict(settings: Make) -> None:
    choice = settings(num_server_rounds=1)
    run(choice, quiet)
    saved = torch.load(choice.folder / "state.pt", weights_only=True)
    network = task.build(choice, task.load(choice, "test"))
    network.load_state_dict(saved["network"])
    accuracy, _ = task.test(network, task.load(choice, "test"), choice)
    assert accuracy == saved["history"][0]["accuracy"]
