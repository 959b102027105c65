"""Times the primitives of a KNConv, except its convolution, against the time of a copy.

    python benchmarks/primitives.py
    python benchmarks/primitives.py --device cuda --dtype bfloat16 --batch-size 128

The floor of a primitive is the time that a copy needs to read and write as many bytes as the
primitive reads and writes of large tensors. All times are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import kernelnorm
from kernelnorm.experiments.heap import keep_freed_memory
from kernelnorm.ops.backends import backend_for, compute_dtype
from kernelnorm.ops.mask import draw_keys
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry

SHAPES = {  # of the input and output of a layer of the case studies
    "VGG8, second layer": (32, 128, 16, 16),
    "ResNet-18, first stage": (8, 64, 48, 48),
    "DenseNet-121, first bottleneck": (8, 128, 40, 40),
}
PASSES = {  # reads and writes of large tensors
    "copy": 2,
    "window_statistics": 1,
    "epilogue": 2,
    "epilogue_backward": 3,
    "statistics_backward": 3,
}
SETTINGS = Settings(Geometry((3, 3), (1, 1), (1, 1), (1, 1)), 1, 0.1, True, 1e-5, 0.0)


def steps(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    def large() -> Tensor:
        x = torch.randn(shape, dtype=dtype, device=device)
        return x.contiguous(memory_format=torch.channels_last)

    x, y, grad = large(), large(), large()
    backend, keys = backend_for(x), draw_keys(shape, device)
    sums, bias = torch.randn(2, shape[1], dtype=compute_dtype(x), device=device).unbind()
    moments = backend.window_statistics(x, keys, SETTINGS, with_means=False)
    terms, factors = [(moments.mu, sums)], (1e-3, 1e-3)
    pair = backend.epilogue_backward(grad, y, moments, sums, bias, 0.0, factors)[1]
    return {
        "copy": lambda: grad.copy_(x),
        "window_statistics": lambda: backend.window_statistics(x, keys, SETTINGS, False),
        "epilogue": lambda: backend.epilogue(y, terms, moments.rstd, bias, 0.0),
        "epilogue_backward": lambda: backend.epilogue_backward(
            grad, y, moments, sums, bias, 0.0, factors
        ),
        "statistics_backward": lambda: backend.statistics_backward(grad, x, pair, keys, SETTINGS),
    }


def seconds(step: Callable, device: torch.device, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16, float16")
    parser.add_argument("--rounds", type=int, default=50, help="timing rounds (default: 50)")
    parser.add_argument("--batch-size", type=int, help="for all layers (default: 32, 8, 8)")
    options = parser.parse_args()
    keep_freed_memory()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    name = kernelnorm.backend(torch.ones(1, 1, 1, device=device, dtype=dtype))
    threads = torch.get_num_threads()
    print(f"backend {name}, {dtype}, PyTorch {torch.__version__}, {threads} threads")
    for title, (batch_size, *rest) in SHAPES.items():
        shape = (options.batch_size or batch_size, *rest)
        of_all = steps(shape, dtype, device)
        times: dict[str, list[float]] = {step: [] for step in of_all}
        for _ in range(options.rounds + 3):
            for step, function in of_all.items():
                times[step].append(seconds(function, device, repeats=10))
        medians = {step: statistics.median(rounds[3:]) for step, rounds in times.items()}
        a_pass = medians["copy"] / PASSES["copy"]
        print(f"\n{title}: {shape}\n{'':20} {'µs':>7} {'passes':>7} {'floor µs':>9} {'ratio':>6}")
        for step, median in medians.items():
            floor = PASSES[step] * a_pass
            print(
                f"{step:20} {1e6 * median:7.0f} {PASSES[step]:7} {1e6 * floor:9.0f} "
                f"{median / floor:6.2f}"
            )


if __name__ == "__main__":
    main()
