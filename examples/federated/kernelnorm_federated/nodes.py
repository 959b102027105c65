"""Which SuperNode plays which clients, and which clients train in a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from kernelnorm_federated.settings import Settings

Say = Callable[[str], None]
START_SECONDS = 600.0
"""Time that SuperNodes have to connect before the first round."""
PLACE = ("partition-id", "num-partitions")
"""Keys of a SuperNode's place, in the configuration with which it is started."""
QUERY_SECONDS = 60.0
"""Time to wait in each round for the places of SuperNodes that connect later."""


@dataclass
class Nodes:
    """The SuperNodes of a run. Number ``i`` of ``n`` plays the clients ``i``, ``i + n``, ...

    Args:
        grid: Flower's grid.
        say: prints a line.
    """

    grid: Grid
    say: Say
    place: dict[int, tuple[int, int]] = field(default_factory=dict)
    """The number ``i`` and the count ``n`` of each SuperNode that has answered, by identifier."""
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
            number, count = (reply.content["config"][key] for key in PLACE)
            counts = (n for other, (_, n) in self.place.items() if other in present)
            others = next(counts, count)
            if count != others:
                self._tell(
                    f"SuperNode {node} is left out: its num-partitions is {count}, that of the "
                    f"others {others}"
                )
                continue
            self.place[node] = number, count

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
        numbers = {number for number, _ in self.place.values()}
        return any(len(numbers) == count for _, count in self.place.values())

    def holders(self, clients: int) -> dict[int, int]:
        """Return the SuperNode, by its identifier, of each client that has a connected one.

        If several have the same number, the last one counts: it was started again.
        """
        present = {*self.grid.get_node_ids()}
        return {
            client: node
            for node, (number, count) in self.place.items()
            if node in present
            for client in range(number, clients, count)
        }


def choose(settings: Settings, server_round: int, present: Collection[int]) -> list[int]:
    """Return the clients that train in a round: the first of a random order that are present.

    The order is a function of ``seed`` and ``server_round``.
    """
    count = max(1, round(settings.fraction_train * settings.clients))
    generator = np.random.default_rng([settings.seed, 2, server_round])
    order = generator.permutation(settings.clients).tolist()
    return sorted([client for client in order if client in present][:count])
