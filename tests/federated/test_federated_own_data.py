"""SuperNodes that train on their own folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.serverapp import Grid
from kernelnorm_federated.local import LocalGrid, run, run_config
from kernelnorm_federated.nodes import Nodes
from kernelnorm_federated.server_app import serve
from kernelnorm_federated.settings import SettingError, Settings
from test_federated_rounds import make_photos, quiet

Make = Callable[..., Settings]


@dataclass
class Owning(LocalGrid):
    """A grid whose SuperNodes have the values in ``data``, by number, in their configuration."""

    data: dict[int, Any] = field(default_factory=dict)

    def node_config(self, node: int) -> dict[str, Any]:
        own = {"data": self.data[node - 1]} if node - 1 in self.data else {}
        return {**super().node_config(node), **own}


def owning(settings: Settings, folder: Path) -> Owning:
    """Two SuperNodes with the same folder."""
    return Owning(run_config(settings), 2, data=dict.fromkeys(range(2), str(folder)))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A client's folder: 36 training images."""
    folder = make_photos(tmp_path / "own", "abc")
    shutil.rmtree(folder / "test")
    return folder


def test_a_supernode_trains_on_its_own_data(settings: Make, tmp_path: Path, own: Path) -> None:
    photos = make_photos(tmp_path / "photos", "abc")
    choice = settings(data=str(photos), clients=2, train_images=30, num_server_rounds=1)
    state = serve(owning(choice, own), choice, quiet)
    assert state.history[0]["images"] == {"0": 36, "1": 36}  # train_images is the server's
    other = replace(choice, out=f"{choice.out}-parts")
    assert run(other, quiet).history[0]["images"] == {"0": 15, "1": 15}


def test_own_data_and_held_out_images_of_the_server(
    settings: Make, tmp_path: Path, own: Path
) -> None:
    photos = make_photos(tmp_path / "photos", "abc")
    choice = settings(data=str(photos), clients=2, num_server_rounds=1, test_on="held-out")
    choice = replace(choice, train_images=24, test_images=12)
    state = serve(owning(choice, own), choice, quiet)
    assert state.history[0]["images"] == {"0": 36, "1": 36}


def test_own_data_need_no_partition_of_the_servers_images(
    settings: Make, tmp_path: Path, own: Path
) -> None:
    photos = make_photos(tmp_path / "photos", "abc", train=1)
    choice = settings(data=str(photos), clients=2, train_images=0, num_server_rounds=1)
    choice = replace(choice, partition="classes", classes_per_client=10)
    state = serve(owning(choice, own), choice, quiet)
    assert state.history[0]["images"] == {"0": 36, "1": 36}
    with pytest.raises(SettingError, match="clients=2: expected at most 0, 10 images for each"):
        run(replace(choice, out=f"{choice.out}-parts"), quiet)


@pytest.mark.parametrize("clients", [1, 4])
def test_clients_is_the_number_of_supernodes_with_own_data(
    settings: Make, tmp_path: Path, own: Path, clients: int
) -> None:
    photos = make_photos(tmp_path / "photos", "abc")
    choice = settings(data=str(photos), clients=clients, train_images=0)
    message = f"clients={clients}: expected 2, one for each SuperNode with its own folder"
    with pytest.raises(SettingError, match=message):
        serve(owning(choice, own), choice, quiet)
    assert not (choice.folder / "state.pt").exists()


@pytest.mark.parametrize(
    ("owner", "message"),
    [(1, "it has data in its --node-config, the others have no data there"),
     (0, "it has no data in its --node-config, the others have data there")],
)  # fmt: skip
def test_a_supernode_is_left_out_if_only_some_have_own_data(
    run_config: dict[str, Any], owner: int, message: str
) -> None:
    grid, lines = Owning(run_config, 2, data={owner: "/data"}), list[str]()
    nodes = Nodes(cast(Grid, grid), lines.append)
    nodes.wait(seconds=0.1, pause=0.05)
    assert [*nodes.place] == [1]
    assert lines == [f"SuperNode 2 is left out: {message}"]


@pytest.mark.parametrize("data", [5, True, "photos", ""])
def test_data_that_are_no_absolute_path_are_refused(run_config: dict[str, Any], data: Any) -> None:
    grid, lines = Owning(run_config, 1, data={0: data}), list[str]()
    with pytest.raises(TimeoutError):
        Nodes(cast(Grid, grid), lines.append).wait(seconds=0.1, pause=0.05)
    assert f"data={data!r}: expected the absolute path of a folder, in quotes" in lines[0]


def test_own_data_with_other_classes_are_refused(settings: Make, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", "abc")
    choice = settings(data=str(photos), clients=2, train_images=0)
    own = make_photos(tmp_path / "own", "abd")
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="no client has answered"):
        serve(owning(choice, own), choice, lines.append)
    message = "client 0 has the classes ['a', 'b', 'd'], the server ['a', 'b', 'c']"
    assert any(message in line for line in lines)
