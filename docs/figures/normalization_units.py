"""Draws normalization_units.png: which outputs of each layer change with one input element.

The picture is computed: each layer runs on an input and on the same input with one element changed,
and the outputs that differ are filled. Needs matplotlib.
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
ELEMENT = (0, 1, 3, 2)  # the one that is changed: sample, channel, row, column
WINDOW, STRIDE = 3, 2
LAYERS = {
    "KernelNorm": (
        KernelNorm2d(WINDOW, STRIDE, dropout_p=0.0),
        "unit (c, 3, 3), stride 2: windows overlap",
    ),
    "BatchNorm": (nn.BatchNorm2d(CHANNELS), "unit (n, h, w)"),
    "LayerNorm": (nn.GroupNorm(1, CHANNELS), "unit (c, h, w)"),
    "GroupNorm": (nn.GroupNorm(2, CHANNELS), "unit (2, h, w)"),
    "InstanceNorm": (nn.InstanceNorm2d(CHANNELS), "unit (h, w)"),
    "PositionalNorm": (PositionalNorm2d(CHANNELS), "unit (c,)"),
    "LocalContextNorm": (LocalContextNorm2d(CHANNELS, 2, WINDOW), "unit (2, 3, 3)"),
}
LARGE = 3  # so many layers are in the upper row
COLORS = ListedColormap(["white", "#7aa6d6"])
GAP = 1  # between two maps, in cells


def moved_outputs(layer: nn.Module) -> Tensor:
    """Returns where the output differs if the element does."""
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[ELEMENT] += 1
    change: Tensor = layer(moved) - layer(x)
    return change.abs() > 1e-9


def copies(layer: nn.Module) -> Tensor:
    """Returns where the output is the normalised element itself: the peaks of its output."""
    x = torch.zeros(SHAPE, dtype=torch.float64)
    x[ELEMENT] = 1
    y: Tensor = layer(x)
    return y > 0.99 * y.max()


def draw_map(ax: Axes, x: int, y: int, moved: Tensor, marked: Tensor, font: float) -> None:
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
        ax.plot(x + column + 0.5, y + row + 0.5, "x", color="black", ms=0.6 * font, mew=0.2 * font)


def draw_layer(ax: Axes, name: str, font: float) -> None:
    """Draws all maps of a layer's output: a row for each sample, a column for each channel."""
    layer, unit = LAYERS[name]
    layer = layer.double().train()
    with torch.no_grad():
        moved, marked = moved_outputs(layer), copies(layer)
    pitch = moved.shape[-1] + GAP
    for sample in range(SAMPLES):
        for channel in range(CHANNELS):
            at = (sample, channel)
            draw_map(ax, channel * pitch, sample * pitch, moved[at], marked[at], font)
            if sample == 0:
                middle = channel * pitch + (pitch - GAP) / 2
                ax.text(middle, -0.5, f"channel {channel + 1}", ha="center", fontsize=font)
        if ax.get_subplotspec().is_first_col():
            place = {"ha": "right", "va": "center", "rotation": 90, "fontsize": font}
            ax.text(-0.6, sample * pitch + (pitch - GAP) / 2, f"sample {sample + 1}", **place)
    ax.set_title(f"$\\bf{{{name}}}$\n{unit}", loc="left", fontsize=font + 1.5, pad=font + 7)
    ax.set(aspect="equal", anchor="NW")
    ax.axis("off")
    ax.invert_yaxis()


def main() -> None:
    """Writes the picture beside this file."""
    names = [*LAYERS]
    figure = plt.figure(figsize=(9, 4.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.6, 1.6))
    for ax, name in zip(upper.subplots(1, LARGE, width_ratios=(9, 7, 7)), names, strict=False):
        draw_layer(ax, name, font=8)
    for ax, name in zip(lower.subplots(1, len(names) - LARGE), names[LARGE:], strict=True):
        draw_layer(ax, name, font=6.5)
    upper.suptitle(
        "× one input element that is changed; filled: the outputs that change with it", fontsize=10
    )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
