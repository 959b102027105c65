"""Initialises the weights of convolutions."""

from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize


def init_convolutions(
    network: nn.Module, mode: Literal["fan_in", "fan_out"], *, fan_of_group: bool = False
) -> None:
    """Draw the weights of all convolutions as He et al. (2015) do, and set their biases to 0.

    Args:
        network: the module whose convolutions are initialised, in place
        mode: ``"fan_in"`` keeps the variance of the activations, ``"fan_out"`` that of the
            gradients
        fan_of_group: if ``True``, ``"fan_out"`` counts the connections inside one group of a
            convolution with groups. By default it counts those of all groups, as in PyTorch

    Example::

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> init_convolutions(network, "fan_in")
        >>> network[0].bias.tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            weight = module.weight
            nn.init.kaiming_normal_(weight, mode=mode, nonlinearity="relu")
            if fan_of_group and mode == "fan_out":
                with torch.no_grad():
                    weight.mul_(module.groups**0.5)
            if parametrize.is_parametrized(module, "weight"):
                module.weight = weight  # sets the parameters that it is computed from
            if module.bias is not None:
                nn.init.zeros_(module.bias)
