"""The places that SuperNodes claim."""

from __future__ import annotations

from typing import Any, cast

import pytest
from flwr.serverapp import Grid
from kernelnorm_federated.local import LocalGrid
from kernelnorm_federated.nodes import PLACE, Nodes
from test_federated_rounds import quiet


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


@pytest.mark.parametrize(
    "place",
    [(2, 2), (-1, 2), (0, 0), ("0", 2), (0.0, 2), (True, 2)],
)
def test_a_wrong_place_is_told_once(run_config: dict[str, Any], place: tuple[Any, Any]) -> None:
    grid, lines = LocalGrid(run_config, 1), list[str]()
    grid.node_config = lambda node: dict(zip(PLACE, place, strict=True))
    with pytest.raises(TimeoutError):
        Nodes(cast(Grid, grid), lines.append).wait(seconds=0.2, pause=0.02)
    assert len(lines) == 1
    assert "partition-id=" in lines[0]
    assert "expected whole numbers" in lines[0]


def test_a_supernode_of_another_number_of_supernodes_is_left_out(
    run_config: dict[str, Any],
) -> None:
    grid, lines = LocalGrid(run_config, 3), list[str]()
    grid.node_config = lambda node: dict(zip(PLACE, (node % 2, 3 if node == 3 else 2), strict=True))
    nodes = Nodes(cast(Grid, grid), lines.append)
    nodes.wait()
    assert nodes.holders(4) == {0: 2, 1: 1, 2: 2, 3: 1}
    assert "SuperNode 3 is left out: its num-partitions is 3, that of the others 2" in lines[0]


def test_supernodes_that_have_gone_do_not_leave_others_out(run_config: dict[str, Any]) -> None:
    grid, lines = LocalGrid(run_config, 2), list[str]()
    grid.node_config = lambda node: dict(zip(PLACE, (node % 2, 2), strict=True))
    nodes = Nodes(cast(Grid, grid), lines.append)
    nodes.wait()
    grid.get_node_ids = lambda: [3, 4, 5]  # type: ignore[method-assign]
    grid.node_config = lambda node: dict(zip(PLACE, (node % 3, 3), strict=True))
    nodes.wait()
    assert nodes.holders(3) == {0: 3, 1: 4, 2: 5}
    assert not lines
