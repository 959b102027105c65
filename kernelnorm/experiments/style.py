"""How figures are drawn: each normalisation has the same colour and marker in all of them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LABELS", "line_style", "png"]

LABELS = {
    "batch": "BatchNorm",
    "group": "GroupNorm",
    "layer": "LayerNorm",
    "instance": "InstanceNorm",
    "positional": "PositionalNorm",
    "local_context": "LocalContextNorm",
    "none": "no normalisation",
    "kernel": "KernelNorm",
}

# Okabe and Ito's colours, which the colour-blind can tell apart; markers for black and white. Lines
# are solid, as a dashed one is a final accuracy.
_STYLES = {
    "batch": ("#0072B2", "o"),
    "group": ("#E69F00", "s"),
    "layer": ("#009E73", "^"),
    "instance": ("#CC79A7", "D"),
    "positional": ("#56B4E9", "v"),
    "local_context": ("#7F7F7F", "P"),
    "none": ("#000000", "x"),
    "kernel": ("#D55E00", "*"),
}


def line_style(norm: str) -> dict[str, Any]:
    """Return the keyword arguments of :meth:`matplotlib.axes.Axes.plot` for a normalisation."""
    color, marker = _STYLES[norm]
    return {"label": LABELS[norm], "color": color, "marker": marker, "markersize": 5}


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    return picture.getvalue()
