"""Measures time and memory of the normalisations; writes tables, a JSON file and a picture.

``bench.json`` has all measurements:

``kernelnorm``, ``machine``
    the package's version; PyTorch's version, the device's name, cores, threads, whether float32
    products are rounded to TF32 (they are on CUDA), and the backend of the kernel layers.
``results``
    a list with an object for each row of the table:

    ``network``, ``image_size``, ``batch_size``, ``dtype``, ``mode``, ``pass``
        the row.
    ``variants``
        one for each norm and memory format, and with ``--private`` for each way to compute clipped
        gradients: ``norm``, ``way`` (empty for the ordinary step), ``memory_format``, ``seconds``
        (of a step, one number per round; the i-th numbers of all variants are of the same round),
        ``saved_bytes`` (stored for the backward pass), ``peak_bytes`` (on CUDA and with
        ``--private``, the peak of the memory that a step allocates), ``failure`` (why there are no
        times, or an empty string).
    ``summary``
        for each norm that has times, in its faster ``memory_format``: the quartiles ``[low, median,
        high]`` of ``seconds``, and of ``to_batch`` and ``to_none``, the ratios to the time of
        BatchNorm and of the network without normalisation in the same round, or null. With
        ``--private`` for each norm and way (``kernel``, ``kernel_bookkeeping``). Its ratios are
        ``to_kernel``, to the ordinary step of the kernel network, and ``to_group_hooks``, to the
        step of the GroupNorm network with the hooks of Opacus.
"""

from __future__ import annotations

import json
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kernelnorm
from kernelnorm.experiments.bench.measure import measure_row, saved_bytes
from kernelnorm.experiments.bench.plan import CASE_STUDIES, Plan, make_plan
from kernelnorm.experiments.bench.report import WIDTH, TimeTable, draw, memory_lines, ratio_lines
from kernelnorm.experiments.bench.results import Result
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.files import write_atomically
from kernelnorm.experiments.machine import cpu_name
from kernelnorm.experiments.plotting import png

__all__ = ["CASE_STUDIES", "Plan", "bench", "make_plan", "saved_bytes"]

BAR_FORMAT = "{percentage:3.0f}%|{bar}| {remaining} left{postfix}"
"""Leaves room for the longest case and norm in 80 columns."""

_NAMES = {
    "batch": "BatchNorm's",
    "none": "the network without normalisation",
    "kernel": "KernelNorm's ordinary step",
    "group_hooks": "the hooks of Opacus with GroupNorm",
}
"""The bases of the ratios, in titles."""


def bench(plan: Plan, out: Path) -> list[Result]:
    """Measure the plan's rows; print the tables, and write ``bench.json`` and ``bench.png``.

    Each finished row adds a line to the table of times, and both files are written again.

    Args:
        plan: the rows to measure, from :func:`make_plan`.
        out: the folder of the two files.

    Returns:
        The results, one for each row.

    Raises:
        RunError: the folder or a file in it cannot be written.
    """
    _check_folder(out)
    results: list[Result] = []
    with _settings(plan):
        machine = _machine(plan)
        print(textwrap.fill(_phrase(machine), WIDTH))
        table = TimeTable(plan)
        first, second = (_NAMES[str(base)] for base in plan.bases)
        print(f"\nTime of a step: ratio to {first}, median ± half the interquartile range")
        print(table.heading())
        with tqdm(
            total=len(plan.rows),
            bar_format=BAR_FORMAT,
            smoothing=0,
            dynamic_ncols=True,
            leave=False,
            disable=None,
        ) as bar:
            for row in plan.rows:

                def progress(what: str, done: float, row: str = str(row.case)) -> None:
                    bar.set_postfix_str(f"{row}: {what}")
                    bar.update(len(results) + done - bar.n)

                result = measure_row(row, plan, progress)
                results.append(result)
                tqdm.write(table.line(result))
                _write(results, plan, machine, out)
    if lines := ratio_lines(results, plan.columns, plan.bases[1]):
        print(f"\nTime of a step: ratio to {second}")
        print("\n".join(lines))
    if memory := memory_lines(results, plan.columns, plan.bases[0]):
        print(f"\nMemory: ratio to {first} (saved: for the backward pass; peak: of a whole step)")
        print("\n".join(memory))
    print(f"\nTimes:   {out / 'bench.json'}\nPicture: {out / 'bench.png'}")
    return results


def _check_folder(out: Path) -> None:
    """Create the folder, so that a wrong one is refused before minutes of measuring."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file has this name" if out.is_file() else error.strerror
        raise RunError(f"--out: cannot create the folder {out}: {reason}") from error
    if not os.access(out, os.W_OK):
        raise RunError(f"--out: cannot write to the folder {out}. Choose another one")


@contextmanager
def _settings(plan: Plan) -> Iterator[None]:
    """Set the threads and, on CUDA, TF32, and silence Opacus; restore all at the end."""
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    try:
        if plan.threads is not None:
            torch.set_num_threads(plan.threads)
        if plan.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Secure RNG turned off")
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _machine(plan: Plan) -> dict[str, Any]:
    cuda = plan.device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "device": f"cuda: {torch.cuda.get_device_name()}" if cuda else f"cpu: {cpu_name()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tf32": cuda,
        "backend": kernelnorm.backend(torch.ones(1, 1, 1, 1, device=plan.device)),
    }


def _phrase(machine: dict[str, Any]) -> str:
    """Return a line about the machine."""
    tf32 = ", float32 products in TF32" if machine["tf32"] else ""
    return (
        f"kernelnorm {kernelnorm.__version__}, PyTorch {machine['torch']}, {machine['device']}, "
        f"cores: {machine['cores']}, threads: {machine['threads']}, "
        f"backend: {machine['backend']}{tf32}"
    )


def _write(results: Sequence[Result], plan: Plan, machine: dict[str, Any], out: Path) -> None:
    record = {
        "kernelnorm": kernelnorm.__version__,
        "machine": machine,
        "results": [result.as_dict(plan.bases) for result in results],
    }
    write_atomically(out / "bench.json", f"{json.dumps(record, indent=1)}\n".encode())
    write_atomically(out / "bench.png", png(draw(results, plan.columns, plan.bases[0])))
