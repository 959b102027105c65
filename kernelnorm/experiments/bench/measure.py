"""Time and memory of the variants of one row.

Each network is warmed up. Then each round times every variant once, in a new random order, so that
a disturbance of the machine affects all variants alike.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from kernelnorm.experiments.bench.plan import DTYPES, MEMORY_FORMATS, Case, Plan, Row
from kernelnorm.experiments.bench.private import allocated_peak, group_norm_twin, made_private
from kernelnorm.experiments.bench.results import Result, Variant
from kernelnorm.models import create_model, list_models

__all__ = ["measure_row", "saved_bytes"]

_LEAST_ROUNDS = 3
_SHORTEST = 0.01
"""Minimum seconds of one timing: a step is repeated so that the fastest variant takes as long."""

Step = Callable[[], None]


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Return the bytes that a training step stores for its backward pass.

    Each storage that autograd saves is counted once; parameters are not counted. The count does
    not depend on the machine.
    """
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x)
    assert output.requires_grad
    return sum(kept.values())


def measure_row(row: Row, plan: Plan, progress: Callable[[str, float], None]) -> Result:
    """Measure the columns of the plan, in each of its memory formats.

    A variant that fails records the reason; the others are still measured.

    Args:
        row: the network, its input and how it runs.
        plan: the columns, memory formats, device and limits.
        progress: called with a phrase for the progress bar, and the finished fraction of the row.
    """
    variants = [
        Variant(column.norm, format_, way=column.way)
        for column in plan.columns
        for format_ in plan.memory_formats
    ]
    steps: dict[int, Step] = {}
    fastest = math.inf
    for i, variant in enumerate(variants):
        progress(f"warm-up {variant.column}", 0.0)
        with _failing(variant):
            steps[i], seconds = _warm_up(row, variant, plan.device)
            fastest = min(fastest, seconds)
    repeats = math.ceil(_SHORTEST / fastest) if steps else 0
    generator, start = random.Random(0), time.perf_counter()
    for done in range(plan.rounds):
        share = max(done / plan.rounds, (time.perf_counter() - start) / (plan.seconds or 1e-9))
        progress("timing", min(1.0, round(share, 2)))
        if share >= 1 and done >= _LEAST_ROUNDS:
            break
        for i in generator.sample([*steps], len(steps)):
            with _failing(variants[i]):
                variants[i].seconds.append(_time(steps[i], repeats, plan.device))
            if variants[i].failure:
                variants[i].seconds.clear()
                del steps[i]
    if row.mode != "eager":
        torch.compiler.reset()  # PyTorch compiles the same function a few times only
    return Result(row, variants)


@contextlib.contextmanager
def _failing(variant: Variant) -> Iterator[None]:
    """Record any exception as the variant's failure, as other variants may work."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        variant.failure = f"failed: {type(error).__name__}: {reason}"


def _warm_up(row: Row, variant: Variant, device: torch.device) -> tuple[Step, float]:
    """Return a step and the seconds that it takes; record its memory in the variant.

    The first steps compile, choose algorithms and record CUDA graphs.
    """
    case, train, graphs = row.case, row.pass_ != "inference", row.mode == "reduce-overhead"
    memory_format = MEMORY_FORMATS[variant.memory_format]
    network = _network(case, variant.norm).to(device).train(train)
    network.to(memory_format=memory_format)  # type: ignore[call-overload]
    if row.mode != "eager":
        network.compile(dynamic=False, mode=row.mode if graphs else None)
    x = torch.rand(case.batch_size, 3, case.image_size, case.image_size, device=device)
    x = x.contiguous(memory_format=memory_format)
    step = (
        _training_step(row, network, x, variant.way) if train else _inference_step(row, network, x)
    )
    for _ in range(3 if graphs else 1):
        step()
    if row.pass_ == "private" and device.type == "cpu":
        variant.peak_bytes = allocated_peak(step)
    if row.pass_ == "train" and not graphs:
        with _autocast(row, x):
            variant.saved_bytes = saved_bytes(network, x)
    if device.type == "cuda" and not graphs:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        variant.peak_bytes = torch.cuda.max_memory_allocated() - before
    return step, _time(step, 1, device)


def _network(case: Case, norm: str) -> nn.Module:
    if case.network in list_models(norm):
        return create_model(case.network, norm=norm, num_classes=10)
    return group_norm_twin(create_model(case.network, num_classes=10))


def _training_step(row: Row, network: nn.Module, x: Tensor, way: str) -> Step:
    y = torch.randint(0, 10, (len(x),), device=x.device)
    criterion: nn.Module = nn.CrossEntropyLoss()
    # A learning rate of 0 costs the same time and leaves the weights unchanged.
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
    if way:
        network, optimizer, criterion = made_private(network, optimizer, x, way)

    def step() -> None:
        _begin(row)
        with _autocast(row, x):
            loss = criterion(network(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _inference_step(row: Row, network: nn.Module, x: Tensor) -> Step:
    def step() -> None:
        _begin(row)
        with torch.no_grad(), _autocast(row, x):
            network(x)

    return step


def _begin(row: Row) -> None:
    """Tell CUDA graphs that the last step's output is no longer needed."""
    if row.mode == "reduce-overhead":
        torch.compiler.cudagraph_mark_step_begin()


def _autocast(row: Row, x: Tensor) -> torch.autocast:
    dtype = DTYPES[row.dtype]
    return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)


def _time(step: Step, repeats: int, device: torch.device) -> float:
    """Return the seconds of a step, the mean over consecutive repeats."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
