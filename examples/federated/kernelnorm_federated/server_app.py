"""The Flower ServerApp: rounds of training by clients, with a state that can be resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from kernelnorm.experiments.files import Lock, remove_parts
from kernelnorm_federated import task
from kernelnorm_federated.aggregation import (
    WEIGHT,
    aggregate,
    make_strategy,
    moments,
    restore_moments,
)
from kernelnorm_federated.nodes import Nodes, Say, choose
from kernelnorm_federated.partitions import split
from kernelnorm_federated.settings import SettingError, Settings
from kernelnorm_federated.state import RunState, load_state

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the app, as Flower calls it."""
    serve(grid, Settings.from_run_config(context.run_config), partial(print, flush=True))


def serve(grid: Grid, settings: Settings, say: Say) -> RunState:
    """Train for the rounds that are missing, and return the last state.

    It replaces Flower's own loop, ``Strategy.start``, which always begins at the first round.

    Args:
        grid: Flower's grid, or a :class:`~kernelnorm_federated.local.LocalGrid`.
        settings: the settings of the run.
        say: prints a line.

    Raises:
        ValueError: the settings do not fit the images or the run that would be resumed.
        BlockingIOError: another process trains this run.
        TimeoutError: no SuperNode has answered before the first round.
        ArithmeticError: the average of the clients gives no finite loss. This round is not saved.
        NoAnswerError: no client has answered in the first round, or in two consecutive rounds. This
            round is not saved.
    """
    with ExitStack() as stack:
        try:
            settings.folder.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(Lock(settings.folder / ".lock").hold()):
                remove_parts(settings.folder)  # of processes that were killed
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process trains the run in {settings.folder}: wait for it, or give "
                "another out"
            ) from error
        except OSError as error:
            raise SettingError(
                "out", str(settings.folder), f"a folder to write to: {error}"
            ) from error
        server = Server(grid, settings, say)
        first, last = len(server.state.history) + 1, settings.num_server_rounds
        if first > 1:
            say(f"resuming after round {first - 1}: {settings.folder}")
        if first <= last:
            server.nodes.wait()
            server.check_partition()
        for server_round in range(first, last + 1):
            server.run_round(server_round)
    accuracy = server.state.history[-1]["accuracy"]
    say(f"accuracy {accuracy:.2%}, the network is in {settings.folder}")
    return server.state


class NoAnswerError(RuntimeError):
    """No client has answered."""


class Server:
    """The server of a run, which trains one round at a time; see :func:`serve`."""

    def __init__(self, grid: Grid, settings: Settings, say: Say) -> None:
        self.grid, self.settings, self.say = grid, settings, say
        train_images, self.test_images = (task.load(settings, part) for part in ("train", "test"))
        self.train_labels = train_images.labels
        images = f"{train_images.fingerprint()} {self.test_images.fingerprint()}"
        identity = {**settings.identity, "images": images}
        saved = load_state(settings.folder, identity)
        self.network = task.build(settings, self.test_images)
        task.try_out(self.network, self.test_images, settings)
        self.buffers = {name for name, _ in self.network.named_buffers()}
        self.strategy = make_strategy(settings)
        self.state = saved or RunState(identity, self.network.state_dict())
        done = len(self.state.history)
        if done > settings.num_server_rounds:
            raise SettingError(
                "num-server-rounds",
                settings.num_server_rounds,
                f"at least {done}, which the run in {settings.folder} has; or give another out",
            )
        if saved is not None:
            self.network.load_state_dict(saved.network)
            saved.write_rounds(settings.folder)
        restore_moments(self.strategy, self.state.moments)
        self.nodes = Nodes(grid, say)

    def check_partition(self) -> None:
        """Refuse an impossible partition here rather than in each client.

        SuperNodes with their own folders need none.
        """
        if not self.nodes.own_data:
            split(self.train_labels, self.settings)

    def run_round(self, server_round: int) -> None:
        """Train, test, and save the state."""
        start = time.monotonic()
        self.nodes.find()
        holders = self.nodes.holders(self.settings.clients)
        chosen = choose(self.settings, server_round, holders)
        replies = self._ask(server_round, {client: holders[client] for client in chosen})
        history, weights, train_loss = self.state.history, self.state.network, None
        if replies:
            weights, train_loss = aggregate(
                self.strategy, server_round, [*replies.values()], weights, self.buffers
            )
        elif not history or not history[-1]["images"]:
            raise NoAnswerError(
                f"round {server_round}: no client has answered. The output above tells why. Run "
                "the same command to resume"
            )
        self.network.load_state_dict(weights)
        accuracy, loss = task.test(self.network, self.test_images, self.settings)
        if not math.isfinite(loss):
            names = {"fedprox": "proximal-mu or ", "fedadam": "server-learning-rate or "}
            raise ArithmeticError(
                f"training diverged: the average of the clients in round {server_round} gives no "
                f"finite loss. Take a smaller {names.get(self.settings.strategy, '')}learning-rate"
            )
        entry = {
            "round": server_round,
            "accuracy": accuracy,
            "loss": loss,
            "train_loss": train_loss,
            "images": {
                str(client): reply.content.metric_records["metrics"][WEIGHT]
                for client, reply in replies.items()
            },
            "seconds": time.monotonic() - start,
        }
        self.state = RunState(
            self.state.identity, weights, moments(self.strategy), [*history, entry]
        )
        self.state.save(self.settings.folder)
        absent = {*range(self.settings.clients)} - {*holders}
        missing = sorted(absent | ({*chosen} - {*replies}))
        self.say(
            f"round {server_round}/{self.settings.num_server_rounds}: "
            f"accuracy {accuracy:.2%}, loss {loss:.4f}, "
            + (f"training loss {train_loss:.4f}, " if train_loss is not None else "")
            + f"{len(replies)} clients{f' (without {missing})' if missing else ''}, "
            f"{entry['seconds']:.1f} s"
        )

    def _ask(self, server_round: int, addresses: dict[int, int]) -> dict[int, Message]:
        """Let clients train; return the replies without an error by client, in ascending order.

        Args:
            server_round: the number of the round, counted from 1.
            addresses: the SuperNode of each client.
        """
        if not addresses:
            return {}
        config = ConfigRecord({"classes": [*self.test_images.classes]})
        sampled = cast(Grid, Sampled([*addresses.values()]))
        arrays = ArrayRecord(self.state.network)
        configured = self.strategy.configure_train(server_round, arrays, config, sampled)
        content = next(iter(configured)).content
        messages = []
        for client, node in addresses.items():
            own = ConfigRecord({**content.config_records["config"], "client": client})
            records = RecordDict({"arrays": content["arrays"], "config": own})
            messages.append(Message(records, node, MessageType.TRAIN))
        replies = {}
        for reply in self.grid.send_and_receive(messages, timeout=self.settings.timeout):
            if reply.has_error():
                self.say(f"SuperNode {reply.metadata.src_node_id} failed: {reply.error.reason}")
            else:
                replies[cast(int, reply.content.config_records["config"]["client"])] = reply
        return dict(sorted(replies.items()))


@dataclass
class Sampled:
    """Replaces the grid when a strategy samples SuperNodes: it has only those that train."""

    nodes: Sequence[int]

    def get_node_ids(self) -> Iterable[int]:
        """Return their identifiers, one for each client."""
        return self.nodes
