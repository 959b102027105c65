"""What a layer does beside its convolution, against the time of copying as many bytes.

    python benchmarks/primitives.py
    python benchmarks/primitives.py --device cuda --dtype bfloat16

Each primitive reads and writes its large tensors a few times; the time of a copy, which reads and
writes one, tells how fast the machine can do that. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kernelnorm.experiments.heap import keep_freed_memory
from kernelnorm.ops import primitives_for
from kernelnorm.ops.mask import draw_keys
from kernelnorm.ops.statistics import gradient_factors
from kernelnorm.ops.windows import Geometry

SHAPES = {  # of an input and an output of the case studies
    "VGG8, second layer, batch 32": (32, 128, 16, 16),
    "ResNet-18, first stage, batch 8": (8, 64, 48, 48),
    "DenseNet-121, first bottleneck, batch 8": (8, 128, 40, 40),
}
PASSES = {  # over the large tensors: reads and writes
    "copy": 2,
    "statistics": 1,
    "epilogue": 2,
    "output gradient": 4,
    "input gradient": 3,
}
P, WINDOW = 0.1, Geometry((3, 3), (1, 1), (1, 1), (1, 1))


def steps(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    def large() -> Tensor:
        x = torch.randn(shape, dtype=dtype, device=device)
        return x.contiguous(memory_format=torch.channels_last)

    x, y, grad = large(), large(), large()
    primitives, keys = primitives_for(x), draw_keys(shape, device)
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(8, shape[1], 3, 3, dtype=wide, device=device)
    vector = torch.zeros(len(weight), dtype=wide, device=device)
    sums, bias = torch.randn(2, shape[1], dtype=wide, device=device).unbind()
    mu, r, *_ = primitives.window_statistics(x, weight, keys, P, WINDOW, 1e-5, wide)
    factors = gradient_factors(shape[1], True, P, WINDOW)
    pair = primitives.output_gradient(grad, y, r, mu, sums, bias, True, factors)[1]
    return {
        "copy": lambda: grad.copy_(x),
        "statistics": lambda: primitives.window_statistics(x, weight, keys, P, WINDOW, 1e-5, wide),
        "epilogue": lambda: primitives.epilogue(y, [mu], [sums], r, bias, True),
        "output gradient": lambda: primitives.output_gradient(
            grad, y, r, mu, sums, bias, True, factors
        ),
        "input gradient": lambda: primitives.through_statistics(
            grad, weight, x, pair, vector, keys, P, WINDOW
        ),
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
    parser.add_argument("--rounds", type=int, default=50, help="of each (default: 50)")
    options = parser.parse_args()
    keep_freed_memory()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    print(f"{device.type}, {dtype}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, shape in SHAPES.items():
        of_all = steps(shape, dtype, device)
        times: dict[str, list[float]] = {step: [] for step in of_all}
        for _ in range(options.rounds + 3):
            for step, function in of_all.items():
                times[step].append(seconds(function, device, repeats=10))
        medians = {step: statistics.median(rounds[3:]) for step, rounds in times.items()}
        a_pass = medians["copy"] / PASSES["copy"]
        print(f"\n{name}: {shape}\n{'':16}  {'µs':>7}  passes  of the speed of a copy")
        for step, median in medians.items():
            speed = PASSES[step] * a_pass / median
            print(f"{step:16}  {1e6 * median:7.0f}  {PASSES[step]:6}  {speed:6.0%}")


if __name__ == "__main__":
    main()
