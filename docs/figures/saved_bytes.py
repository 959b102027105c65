"""Draws saved_bytes.png: the bytes that a training step stores for its backward pass."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from kernelnorm.experiments.bench import CASE_STUDIES, saved_bytes
from kernelnorm.experiments.style import LABELS, line_style, network_label
from kernelnorm.models import create_model

NORMS = ("batch", "group", "layer", "kernel")
HATCHES = dict(zip(NORMS, ("", "//", "..", "xx"), strict=True))


def main() -> None:
    """Write the figure beside this file."""
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots()
    for column, (name, size) in enumerate(CASE_STUDIES.items()):
        x = torch.rand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
        for i, norm in enumerate(NORMS):
            network = create_model(name, norm=norm).to(memory_format=torch.channels_last)
            megabytes = saved_bytes(network, x) / 2e6
            if norm == "batch":
                whole = megabytes
            place = column + (i - 1.5) * 0.2
            label = LABELS[norm] if column == 0 else None
            color = line_style(norm)["color"]
            axes.bar(
                place, megabytes / whole, 0.18, color=color, hatch=HATCHES[norm],
                edgecolor="white", label=label,
            )  # fmt: skip
            axes.annotate(f"{megabytes:.1f}", (place, megabytes / whole), ha="center", va="bottom")
    names = [f"{network_label(name)}, {size}×{size}" for name, size in CASE_STUDIES.items()]
    axes.set_xticks(range(len(CASE_STUDIES)), names)
    axes.set_ylabel("stored, BatchNorm = 1")
    axes.set_ylim(0, 1.2)
    axes.set_title("Stored for the backward pass (on the bars: MB per image, float32)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(NORMS))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
