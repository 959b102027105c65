"""The steps of training: the batches of an epoch, and what the optimizer does with each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.data import Augment, Images, Preprocess, batches, steps_per_epoch
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.runs import Metrics
from kernelnorm.norms import adaptive_clip_grad_, clipped_parameters

__all__ = ["Material", "PlainSteps", "Steps", "forward", "make_optimizer"]

B = TypeVar("B")


@dataclass(frozen=True)
class Material:
    """What the steps of a run need.

    Args:
        config: the run's configuration.
        fabric: the device and the processes.
        network: the network to train.
        images: the training images.
        preprocess: converts ``uint8`` images to the network's input.
        compile: run the network through :func:`torch.compile`.
    """

    config: RunConfig
    fabric: Fabric
    network: nn.Module
    images: Images
    preprocess: Preprocess
    compile: bool

    @property
    def augment(self) -> Augment | None:
        """The augmentation of the training images; ``None``: none."""
        return Augment() if self.config.augment else None


class Steps(Protocol[B]):
    """How a run takes its steps; a batch ``B`` is what :meth:`batches` gives to :meth:`take`.

    Attributes:
        per_epoch: the number of steps in an epoch.
        evaluated: the network that is tested, and whose weights are saved for use.
        optimizer: takes the steps, with the learning rates of its groups.
    """

    per_epoch: int
    evaluated: nn.Module
    optimizer: Any

    def batches(self, epoch: int, start_step: int) -> Iterator[B]:
        """Iterate over the batches of an epoch from a step on, the same at each call."""

    def take(self, batch: B) -> tuple[Tensor, int]:
        """Take a step.

        Returns:
            the sum of the loss over the images of the batch and how many were classified correctly,
            in a tensor of shape :math:`(2,)`, and the number of these images.
        """

    def metrics(self) -> Metrics:
        """Return further metrics of the steps so far, besides loss and accuracy."""

    def record(self) -> dict[str, Any]:
        """Return the steps' entries in ``config.yaml``."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, without the weights of :attr:`evaluated`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, which has the weights of :attr:`evaluated` under ``"model"``."""


class PlainSteps:
    """Steps of the optimizer with the gradient of a batch; see :class:`Steps`."""

    def __init__(self, material: Material) -> None:
        self.material = material
        config, fabric, network = material.config, material.fabric, material.network
        self.shares: dict[str, Any] = {
            "batch_size": config.batch_size // fabric.world_size,
            "train": True,
            "rank": fabric.global_rank,
            "world_size": fabric.world_size,
        }
        self.per_epoch = steps_per_epoch(len(material.images), **self.shares)
        if not self.per_epoch:
            raise RunError(f"{len(material.images)} training images are too few for a batch")
        if material.compile:
            torch.compiler.reset()  # PyTorch limits how often it compiles the same function
            graphs = fabric.device.type == "cuda" and fabric.world_size == 1
            # Batches have two sizes, the last being smaller.
            network.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
        self.evaluated = network
        self.clipped = clipped_parameters(network)
        self.model, self.optimizer = fabric.setup(network, make_optimizer(network, config))

    def batches(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`Steps`."""
        material = self.material
        return batches(
            material.images,
            **self.shares,
            seed=material.config.seed,
            epoch=epoch,
            start_step=start_step,
            augment=material.augment,
            preprocess=material.preprocess,
            device=material.fabric.device,
        )

    def take(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        """See :class:`Steps`."""
        x, y = batch
        if self.material.compile:
            torch.compiler.cudagraph_mark_step_begin()  # its graphs may reuse the last tensors
        logits = forward(self.model, x, self.material.config)
        loss = F.cross_entropy(logits, y)
        self.material.fabric.backward(loss)
        if self.material.config.agc is not None:
            adaptive_clip_grad_(self.clipped, self.material.config.agc)
        self.optimizer.step()
        self.optimizer.zero_grad()
        correct = (logits.argmax(1) == y).sum()
        return torch.stack([loss.detach() * len(y), correct]), len(y)

    def metrics(self) -> Metrics:
        """See :class:`Steps`."""
        return {}

    def record(self) -> dict[str, Any]:
        """See :class:`Steps`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Steps`."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Steps`."""
        self.evaluated.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def make_optimizer(network: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a run."""
    decay = config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=decay)
    return torch.optim.SGD(
        network.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=decay
    )


def forward(model: nn.Module, x: Tensor, config: RunConfig) -> Tensor:
    """Return the network's output in training.

    Raises:
        RunError: the network does not take images of this size.
    """
    try:
        logits: Tensor = model(x.to(memory_format=torch.channels_last))
    except (RuntimeError, ValueError) as error:
        problem = str(error)
        too_small = "too small" in problem or "greater than actual input size" in problem
        if isinstance(error, RuntimeError) and not too_small:
            raise  # such as too little memory
        raise RunError(
            f"{config.model} with norm {config.norm} cannot train on batches of shape "
            f"{tuple(x.shape)}: {error}. Try a larger --image-size or --batch-size"
        ) from error
    return logits
