"""Flower's strategies, and the average of the clients' answers, buffers included."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx
from torch import Tensor

from kernelnorm_federated.settings import Settings

WEIGHT = "num-examples"
"""The metric by which answers are weighted: how many images a client has trained on."""
State = dict[str, Tensor]
"""The state of a network, by name."""


def make_strategy(settings: Settings) -> FedAvg:
    """Return Flower's strategy; who trains is chosen outside of it."""
    nodes = {"min_train_nodes": 1, "min_available_nodes": 1}
    if settings.strategy == "fedprox":
        return FedProx(proximal_mu=settings.proximal_mu, **nodes)
    if settings.strategy == "fedadam":
        return FedAdam(eta=settings.server_learning_rate, **nodes)
    return FedAvg(**nodes)


def aggregate(
    strategy: FedAvg,
    server_round: int,
    replies: Sequence[Message],
    state: State,
    buffers: Collection[str],
) -> tuple[State, float]:
    """Return the next state of the server's network, and the mean training loss of the clients.

    The strategy decides about the parameters. The buffers, which are BatchNorm's statistics, are
    always averaged, weighted by images: FedAdam's step could make a variance negative. Counters
    (``num_batches_tracked``) are averaged, too, and rounded.

    Args:
        strategy: has configured this round.
        server_round: counted from 1.
        replies: without errors, in an order that does not depend on who answered first: sums of
            floating-point numbers do.
        state: the server's, for the types of its tensors.
        buffers: names of the tensors in ``state`` that are not parameters.
    """
    arrays, metrics = strategy.aggregate_train(server_round, replies)
    if arrays is None or metrics is None:
        raise ValueError("expected at least one reply")
    new = {
        name: average(replies, name) if name in buffers else torch.from_numpy(array.numpy())
        for name, array in arrays.items()
    }
    return {name: _as(new[name], old.dtype) for name, old in state.items()}, metrics["train-loss"]


def average(replies: Sequence[Message], name: str) -> Tensor:
    """Return the average of one tensor in float64, weighted by images."""
    arrays: list[ArrayRecord] = [reply.content["arrays"] for reply in replies]
    weights = np.array([reply.content["metrics"][WEIGHT] for reply in replies], dtype=float)
    values = np.stack([record[name].numpy().astype(float) for record in arrays])
    return torch.from_numpy(np.asarray(np.tensordot(weights / weights.sum(), values, axes=1)))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor if dtype.is_floating_point else tensor.round()).to(dtype)


def moments(strategy: FedAvg) -> dict[str, State]:
    """Return what the strategy remembers from round to round: FedAdam's two moments, or nothing."""
    found = {name: getattr(strategy, name, None) for name in ("m_t", "v_t")}
    return {
        name: {key: torch.as_tensor(np.asarray(array)) for key, array in arrays.items()}
        for name, arrays in found.items()
        if arrays
    }


def restore_moments(strategy: FedAvg, saved: dict[str, State]) -> None:
    """Give the strategy back what :func:`moments` returned."""
    for name, tensors in saved.items():
        setattr(strategy, name, {key: tensor.numpy() for key, tensor in tensors.items()})
