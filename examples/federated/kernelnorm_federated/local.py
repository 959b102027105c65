"""The app in one process: the same server and clients, without Flower's processes between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # private, but Flower's messages need it

from kernelnorm_federated.client_app import app
from kernelnorm_federated.nodes import Say
from kernelnorm_federated.server_app import serve
from kernelnorm_federated.settings import Settings
from kernelnorm_federated.state import RunState

FAILED = 1
"""The code of an error in an answer."""


@dataclass
class LocalGrid:
    """A grid that calls the ClientApp for each message, one after the other.

    Args:
        run_config: the run configuration.
        nodes: the number of SuperNodes.
    """

    run_config: dict[str, Any]
    nodes: int

    def __post_init__(self) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = 1
        TaskIdentity.node_id = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the identifiers of the SuperNodes; they count from 1."""
        return range(1, self.nodes + 1)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield the answers."""
        yield from map(self.answer, messages)

    def node_config(self, node: int) -> dict[str, Any]:
        """Return the configuration with which the SuperNode was started."""
        return {"partition-id": node - 1, "num-partitions": self.nodes}

    def answer(self, message: Message) -> Message:
        """Return the answer of the SuperNode to which the message is addressed."""
        node = message.metadata.dst_node_id
        context = Context(
            run_id=1,
            node_id=node,
            node_config=self.node_config(node),
            state=RecordDict(),
            run_config=self.run_config,
        )
        try:
            return app(message, context)
        except Exception as error:  # like a SuperNode, which sends errors to the server
            return Message(Error(FAILED, str(error)), reply_to=message)


def run_config(settings: Settings) -> dict[str, Any]:
    """Return the run configuration that gives such settings."""
    return {name.replace("_", "-"): value for name, value in asdict(settings).items()}


def run(settings: Settings, say: Say) -> RunState:
    """Run the app with a SuperNode for each client."""
    grid = LocalGrid(run_config(settings), settings.clients)
    return serve(cast(Grid, grid), settings, say)
