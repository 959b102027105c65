"""How long a training step takes, against the BatchNorm twin: variants interleaved in one process.

A step of each norm in turn, many times over; the table has the median of the ratios to BatchNorm's
step of the same round, and their quartiles. Run it on a quiet machine with
``python benchmarks/training_step.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernelnorm.models import create_model

CASES = (("vgg8", 128, 32), ("vgg8", 32, 32), ("vgg8", 2, 32))
CASES += (("resnet18", 8, 192), ("densenet121", 8, 160))  # network, batch size, image size
NORMS = ("batch", "none", "group", "layer", "kernel")
ROUNDS = 15


def step_of(name: str, norm: str, batch_size: int, size: int) -> Callable[[], None]:
    """Return a training step of a fresh network on one batch, in the channels_last format."""
    network = create_model(name, norm=norm, num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    x = torch.rand(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch_size,))

    def step() -> None:
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print(f"{'network':12}{'batch':>6}" + "".join(f"{norm:>20}" for norm in NORMS))
    for name, batch_size, size in CASES:
        steps = {norm: step_of(name, norm, batch_size, size) for norm in NORMS}
        seconds: dict[str, list[float]] = {norm: [] for norm in NORMS}
        for i in range(ROUNDS + 2):
            for norm, step in steps.items():
                start = time.perf_counter()
                step()
                if i >= 2:
                    seconds[norm].append(time.perf_counter() - start)
        cells = [f"{1e3 * statistics.median(seconds['batch']):17.0f} ms"]
        for norm in NORMS[1:]:
            ratios = [a / b for a, b in zip(seconds[norm], seconds["batch"], strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{median:8.2f} ({low:.2f}-{high:.2f})"[:20].rjust(20))
        print(f"{name:12}{batch_size:6}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
