"""Display names of norms and networks; a colour and a marker for each norm."""

from __future__ import annotations

from typing import Any, get_args

from kernelnorm.norms import NORMS, NormGroup, describe

__all__ = ["LABELS", "line_style", "network_label"]

LABELS = {
    name: describe(name).label
    for group in get_args(NormGroup)
    for name in NORMS
    if describe(name).group == group
}
"""The norms' display names, in the order of tables and legends: group by group."""

_NETWORKS = {
    "vgg": "VGG",
    "resnet": "ResNet-",
    "densenet": "DenseNet-",
    "knresnet": "KNResNet-",
    "efficientnet_b": "EfficientNet-B",
    "mobilenet_v3_small": "MobileNetV3-small",
}

# The paper's four norms and a few others have Okabe and Ito's colours, which the colour-blind can
# tell apart. There are more norms than such colours, so each norm has its own marker, too.
# Lines are solid, as a dashed line is the mean of the last epochs.
_STYLES = {
    "batch": ("#0072B2", "o"),
    "group": ("#E69F00", "s"),
    "layer": ("#009E73", "^"),
    "instance": ("#CC79A7", "D"),
    "positional": ("#56B4E9", "v"),
    "local_context": ("#7F7F7F", "P"),
    "local_context_sliding": ("#B8B8B8", "+"),
    "batch_renorm": ("#00337A", "<"),
    "batch_channel": ("#6A51A3", ">"),
    "evonorm_s0": ("#8B0000", "p"),
    "frn": ("#8C564B", "h"),
    "lrn": ("#A6A61A", "d"),
    "ws_group": ("#F0E442", "X"),
    "weight_norm": ("#00544A", "8"),
    "nf": ("#C51B7D", "H"),
    "none": ("#000000", "x"),
    "kernel": ("#D55E00", "*"),
}


def line_style(norm: str) -> dict[str, Any]:
    """Return the keyword arguments of :meth:`matplotlib.axes.Axes.plot` for a normalisation."""
    color, marker = _STYLES[norm]
    return {"label": LABELS[norm], "color": color, "marker": marker, "markersize": 5}


def network_label(network: str) -> str:
    """Return the display name of a network: ``"DenseNet-121"`` for ``"densenet121"``."""
    family = network.rstrip("0123456789")
    return _NETWORKS.get(family, family) + network[len(family) :]
