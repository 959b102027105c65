"""Draws tiles.png: where an image's tiles give another output than the image at once.

The networks have three 3x3 convolutions and random weights; their maps show the largest difference
of the output's channels, in standard deviations of the output. Needs matplotlib.
"""

import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from kernelnorm.experiments.style import LABELS

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "tiles.py"))
SIDE, TILE, OVERLAP = 256, 64, 3
NORMS = ("instance", "group", "kernel")
LARGEST = 1.0  # of the colours


def image() -> Tensor:
    """Returns discs of random colours and sizes on a dark, noisy ground."""
    random = torch.Generator().manual_seed(5)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    x = 0.15 + 0.03 * torch.rand(3, SIDE, SIDE, generator=random)
    for _ in range(14):
        row, column, size = torch.rand(3, generator=random)
        distance = (rows - SIDE * row).square() + (columns - SIDE * column).square()
        disc = distance < (8 + 40 * size.square()) ** 2
        x = torch.where(disc, torch.rand(3, 1, 1, generator=random), x)
    return x[None]


def difference(norm: str, x: Tensor) -> Tensor:
    """Returns the difference between the stitched tiles and the whole image, for each pixel."""
    torch.manual_seed(0)
    block = EXAMPLE["block"]
    network = nn.Sequential(block(norm, 3, 64), block(norm, 64, 64), nn.Conv2d(64, 8, 3, padding=1))
    network.eval()
    with torch.no_grad():
        whole = network(x)
        tiled: Tensor = EXAMPLE["in_tiles"](network, x, TILE, OVERLAP)
    return ((tiled - whole).abs() / whole.std())[0].amax(dim=0)


def draw_grid(ax: Axes, color: str) -> None:
    """Draws the borders of the tiles."""
    for line in range(TILE, SIDE, TILE):
        ax.axhline(line - 0.5, color=color, lw=0.6)
        ax.axvline(line - 0.5, color=color, lw=0.6)
    ax.set(xticks=[], yticks=[])


def main() -> None:
    """Writes the picture beside this file."""
    x = image()
    figure = plt.figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots(1, 1 + len(NORMS))
    axes[0].imshow(x[0].permute(1, 2, 0), interpolation="nearest")
    axes[0].set_title(f"image, tiles of {TILE}×{TILE}", fontsize=10)
    draw_grid(axes[0], "white")
    for ax, norm in zip(axes[1:], NORMS, strict=True):
        change = difference(norm, x)
        colors = ax.imshow(change, "magma", vmin=0, vmax=LARGEST, interpolation="nearest")
        largest = float(change.max())
        shown = f"{largest:.1f}" if largest > 0.05 else f"{largest:.0e}"
        ax.set_title(f"{LABELS[norm]}: up to {shown} σ", fontsize=10)
        draw_grid(ax, "0.5")
    figure.colorbar(colors, ax=axes, label="|tiles - whole| / σ", extend="max", shrink=0.9)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
