"""Which SuperNode plays which clients, and which clients train in a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from kernelnorm_federated.settings import SettingError, Settings

Say = Callable[[str], None]
START_SECONDS = 600.0
"""Time that SuperNodes have to connect before the first round."""
PLACE = ("partition-id", "num-partitions")
"""Keys of a SuperNode's place, in the configuration with which it is started."""
OWN_DATA = "own-data"
"""Key in the answer of a SuperNode: whether it has a folder of its own."""
QUERY_SECONDS = 60.0
"""Time to wait in each round for the places of SuperNodes that connect later."""


class Place(NamedTuple):
    """The answer of a SuperNode: its number, their count, and whether it has its own folder."""

    number: int
    count: int
    own_data: bool


@dataclass
class Nodes:
    """The SuperNodes of a run. Number ``i`` of ``n`` plays the clients ``i``, ``i + n``, ...

    Args:
        grid: Flower's grid.
        say: prints a line.
    """

    grid: Grid
    say: Say
    place: dict[int, Place] = field(default_factory=dict)
    """The place of each SuperNode that has answered, by identifier."""
    told: set[str] = field(default_factory=set)
    """The lines about unused SuperNodes that have been printed."""

    def find(self, timeout: float = QUERY_SECONDS) -> None:
        """Ask new SuperNodes for their place, and wait at most ``timeout`` seconds."""
        present = {*self.grid.get_node_ids()}
        new = present - {*self.place}
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in sorted(new)]
        if not questions:
            return
        for reply in self.grid.send_and_receive(questions, timeout=timeout):
            node = reply.metadata.src_node_id
            if reply.has_error():
                self._tell(f"SuperNode {node} failed: {reply.error.reason}")
                continue
            place = Place(*(reply.content["config"][key] for key in (*PLACE, OWN_DATA)))
            others = next((p for other, p in self.place.items() if other in present), place)
            if place.count != others.count:
                self._tell(
                    f"SuperNode {node} is left out: its num-partitions is {place.count}, that of "
                    f"the others {others.count}"
                )
            elif place.own_data != others.own_data:
                has, have = ("no ", "") if others.own_data else ("", "no ")
                self._tell(
                    f"SuperNode {node} is left out: it has {has}data in its --node-config, the "
                    f"others have {have}data there"
                )
            else:
                self.place[node] = place

    def _tell(self, line: str) -> None:
        """Print a line once, though a SuperNode without a place is asked in each round."""
        if line not in self.told:
            self.told.add(line)
            self.say(line)

    def wait(self, seconds: float = START_SECONDS, pause: float = 1.0) -> None:
        """Wait until all SuperNodes have answered, or until the time is over.

        Raises:
            TimeoutError: no SuperNode has answered.
        """
        end = time.monotonic() + seconds
        self.find(seconds)
        while not self._complete() and time.monotonic() < end:
            time.sleep(pause)
            self.find(max(pause, end - time.monotonic()))
        if not self.place:
            raise TimeoutError(
                f"no SuperNode has answered in {seconds:g} s: start some, see docs/federated.md"
            )

    def _complete(self) -> bool:
        numbers = {place.number for place in self.place.values()}
        return any(len(numbers) == place.count for place in self.place.values())

    @property
    def own_data(self) -> bool:
        """Whether the SuperNodes have their own folders."""
        return any(place.own_data for place in self.place.values())

    def holders(self, clients: int) -> dict[int, int]:
        """Return the SuperNode, by its identifier, of each client that has a connected one.

        If several have the same number, the last one counts: it was started again.

        Raises:
            SettingError: the SuperNodes have their own folders, and ``clients`` is not their count.
        """
        present = {*self.grid.get_node_ids()}
        places = {node: place for node, place in self.place.items() if node in present}
        for place in places.values():
            if place.own_data and place.count != clients:
                expected = f"{place.count}, one for each SuperNode with its own folder"
                raise SettingError("clients", clients, expected)
        return {
            client: node
            for node, place in places.items()
            for client in range(place.number, clients, place.count)
        }


def choose(settings: Settings, server_round: int, present: Collection[int]) -> list[int]:
    """Return the clients that train in a round: the first of a random order that are present.

    The order is a function of ``seed`` and ``server_round``.
    """
    count = max(1, round(settings.fraction_train * settings.clients))
    generator = np.random.default_rng([settings.seed, 2, server_round])
    order = generator.permutation(settings.clients).tolist()
    return sorted([client for client in order if client in present][:count])
