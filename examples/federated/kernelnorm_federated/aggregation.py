"""Flower's strategies, and the average of the clients' replies, buffers included."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx
from torch import Tensor

from kernelnorm_federated.settings import Settings

WEIGHT = "num-examples"
"""The metric by which replies are weighted: the number of the client's training images."""
State = dict[str, Tensor]
"""The state of a network, by name."""


def make_strategy(settings: Settings) -> FedAvg:
    """Return Flower's strategy; :func:`~kernelnorm_federated.nodes.choose` chooses the clients."""
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

    The strategy decides about the parameters. The buffers, which are the running statistics of
    norms such as BatchNorm, are always averaged, weighted by images: FedAdam's step could make a
    variance negative. Counters (``num_batches_tracked``, which ``batch_renorm`` reads) are
    averaged, too, and rounded.

    Args:
        strategy: the strategy, which has configured this round.
        server_round: the number of the round, counted from 1.
        replies: the replies without errors, in the order of the clients, since the order changes
            the rounding of sums.
        state: the server's state, which gives the dtypes.
        buffers: names of the tensors in ``state`` that are not parameters.

    Raises:
        ValueError: there are no replies.
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
    """Return the strategy's state between rounds: FedAdam's two moments, or nothing."""
    found = {name: getattr(strategy, name, None) for name in ("m_t", "v_t")}
    return {
        name: {key: torch.as_tensor(np.asarray(array)) for key, array in arrays.items()}
        for name, arrays in found.items()
        if arrays
    }


def restore_moments(strategy: FedAvg, saved: dict[str, State]) -> None:
    """Set the strategy's state to a result of :func:`moments`."""
    for name, tensors in saved.items():
        setattr(strategy, name, {key: tensor.numpy() for key, tensor in tensors.items()})
