"""The state of a run, which the server writes after each round: all that it needs to go on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "state.pt"
ROUNDS = "rounds.jsonl"


@dataclass
class RunState:
    """A network after some rounds.

    Args:
        identity: what determines the result: the settings and the images.
        network: the state of the network.
        moments: what the strategy remembers.
        history: an entry for each round: ``round``, ``accuracy``, ``loss``, ``train_loss``,
            ``images`` (of each client that answered, by its number as text), ``seconds``.
    """

    identity: dict[str, Any]
    network: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write ``state.pt`` and a readable copy of the history, ``rounds.jsonl``.

        A process that is killed leaves the state of the round before.
        """
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{FILE}.new"
        with new.open("wb") as file:
            torch.save(vars(self), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(folder / FILE)
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        (folder / ROUNDS).write_text(lines)


def load_state(folder: Path, identity: dict[str, Any]) -> RunState | None:
    """Return the state in ``folder``; ``None`` if there is none.

    Raises:
        ValueError: the state is damaged, or of another run; the message names the first key of the
            run configuration that differs.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        state = RunState(**torch.load(path, weights_only=True))
    except Exception as error:  # whatever PyTorch raises about a damaged file
        raise ValueError(
            f"{path} cannot be read ({error}): delete it to begin anew, or give another out"
        ) from error
    for name, value in identity.items():
        before = state.identity.get(name)
        if before != value:
            key = name.replace("_", "-")
            raise ValueError(
                f"run-config {key}={value!r}: expected {before!r}, as in the run in {folder}, "
                "which would be resumed. Give that value, or another out"
            )
    return state
