"""Draws normalization_units.png: which outputs of each layer move when one input element does.

Nothing is drawn from a definition: each layer runs on an input and on the same input with one
element moved, and the outputs that differ are filled. Needs matplotlib.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import Tensor, nn

from kernelnorm import KernelNorm2d
from kernelnorm.norms import LocalContextNorm2d, PositionalNorm2d

SHAPE = SAMPLES, CHANNELS, SIZE, _ = (2, 4, 7, 7)
ELEMENT = (0, 1, 3, 2)  # the one that is moved: sample, channel, row, column
WINDOW, STRIDE = 3, 2
LAYERS = {
    "Input": (nn.Identity(), "one element (×) is moved; filled: what moves with it"),
    "BatchNorm": (nn.BatchNorm2d(CHANNELS), "unit (n, h, w)"),
    "LayerNorm": (nn.GroupNorm(1, CHANNELS), "unit (c, h, w)"),
    "InstanceNorm": (nn.InstanceNorm2d(CHANNELS), "unit (h, w)"),
    "GroupNorm": (nn.GroupNorm(2, CHANNELS), "unit (2, h, w)"),
    "PositionalNorm": (PositionalNorm2d(CHANNELS), "unit (c,)"),
    "LocalContextNorm": (LocalContextNorm2d(CHANNELS, 2, WINDOW), "unit (2, 3, 3)"),
    "KernelNorm": (
        KernelNorm2d(WINDOW, STRIDE, dropout_p=0.0),
        "unit (c, 3, 3), stride 2; 7 × 7 becomes 9 × 9",
    ),
}
COLORS = ListedColormap(["white", "#7aa6d6"])
PITCH = 10.5  # from one map to the next, in cells


def moved_outputs(layer: nn.Module) -> Tensor:
    """Returns where the output differs when the element does."""
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[ELEMENT] += 1
    change: Tensor = layer(moved) - layer(x)
    return change.abs() > 1e-9


def copies(layer: nn.Module) -> Tensor:
    """Returns where the output is the element itself, normalised: the peaks of a single peak."""
    x = torch.zeros(SHAPE, dtype=torch.float64)
    x[ELEMENT] = 1
    y: Tensor = layer(x)
    return y > 0.99 * y.max()


def draw_map(ax: Axes, x: float, y: float, moved: Tensor, marked: Tensor) -> None:
    """Draws one channel of one sample with its upper left corner at ``(x, y)``."""
    size = len(moved)
    corners = torch.arange(size + 1)
    ax.pcolormesh(
        x + corners, y + corners, moved, cmap=COLORS, vmin=0, vmax=1, edgecolors="0.75", lw=0.3
    )
    for corner in range(0, size + 1, size if size == SIZE else WINDOW):  # maps, or their windows
        ax.plot([x + corner] * 2, [y, y + size], color="0.15", lw=1.0)
        ax.plot([x, x + size], [y + corner] * 2, color="0.15", lw=1.0)
    for row, column in marked.nonzero().tolist():
        ax.plot(x + column + 0.5, y + row + 0.5, "x", color="black", ms=4.5, mew=1.5)


def draw_layer(ax: Axes, name: str) -> None:
    """Draws all maps of a layer's output: a row for each sample, a column for each channel."""
    layer, unit = LAYERS[name]
    layer = layer.double().train()
    with torch.no_grad():
        moved, marked = moved_outputs(layer), copies(layer)
    size = moved.shape[-1]
    for sample in range(SAMPLES):
        for channel in range(CHANNELS):
            at = (sample, channel)
            draw_map(ax, channel * PITCH, sample * PITCH, moved[at], marked[at])
            if sample == 0:
                ax.text(channel * PITCH + size / 2, -0.5, f"channel {channel + 1}", ha="center")
        row_label = f"sample {sample + 1}"
        ax.text(-0.6, sample * PITCH + size / 2, row_label, ha="right", va="center", rotation=90)
    ax.set_title(f"$\\bf{{{name}}}$   {unit}", loc="left", fontsize=9.5, pad=8)
    ax.set(xlim=(-2, CHANNELS * PITCH), ylim=(SAMPLES * PITCH - 1, -1), aspect="equal", anchor="NW")
    ax.axis("off")


def main() -> None:
    """Writes the picture beside this file."""
    plt.rcParams.update({"font.size": 8})
    figure, axes = plt.subplots(4, 2, figsize=(9, 9.4), layout="constrained")
    for ax, name in zip(axes.flat, LAYERS, strict=True):
        draw_layer(ax, name)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
