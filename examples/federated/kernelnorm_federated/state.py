"""The state of a run, which the server writes after each round, and needs to resume the run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kernelnorm.experiments.files import write_atomically
from kernelnorm.experiments.saved import load_checked, save_atomically

FILE = "state.pt"
ROUNDS = "rounds.jsonl"


@dataclass
class RunState:
    """A network after some rounds.

    Args:
        identity: the settings that determine the result, and the fingerprint of the images.
        network: the state of the network.
        moments: the moments of the strategy, which FedAdam has.
        history: an entry for each round: ``round``, ``accuracy``, ``loss``, ``train_loss``,
            ``images`` (how many each client has that answered, by its number as text), ``seconds``.
    """

    identity: dict[str, Any]
    network: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write ``state.pt`` and a readable copy of the history, ``rounds.jsonl``.

        If the process is killed, the state of the round before is left.
        """
        save_atomically(folder / FILE, vars(self))
        self.write_rounds(folder)

    def write_rounds(self, folder: Path) -> None:
        """Write the readable copy of the history."""
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_atomically(folder / ROUNDS, lines.encode())


def load_state(folder: Path, identity: dict[str, Any]) -> RunState | None:
    """Return the state in ``folder``; ``None`` if there is none.

    Raises:
        ValueError: the state is damaged, or is that of another run; the message names the first key
            of the run configuration that differs.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        state = _read(path)
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(
            f"{path} cannot be read ({error}): delete it to begin anew, or give another out"
        ) from error
    for name, value in identity.items():
        before = state.identity.get(name)
        if before != value and name == "images":
            raise ValueError(
                f"the images are not those of the run in {folder}, which would be resumed. Restore "
                "those images, or give another out"
            )
        if before != value:
            key = name.replace("_", "-")
            raise ValueError(
                f"run-config {key}={value!r}: expected {before!r}, as in the run in {folder}, "
                "which would be resumed. Give that value, or another out"
            )
    return state


def _read(path: Path) -> RunState:
    state = RunState(**load_checked(path))
    tensors = [*state.network.values(), *(x for m in state.moments.values() for x in m.values())]
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise ValueError("a part is missing")
    if not all(isinstance(entry["images"], dict) for entry in state.history):
        raise ValueError("its history is damaged")
    return state
