"""Many small random layers, for kernels that were built with sanitizers: see ``--kernels``."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from kernelnorm.ops.backends import cpu
from kernelnorm.ops.settings import Settings
from kernelnorm.ops.windows import Geometry
from tests.oracle import DTYPES, EPS, Subject, check_layer
from tests.strategies import EXPANDED, LAYOUTS, Case

LAST_CASES = Path(__file__).parent.parent / "build" / "fuzz"
"""A file for each test that failed, or whose process died: its last case, and how to repeat it."""


def random_case(choose: random.Random) -> Case:
    """Odd strides and dilations, sizes from the smallest that fits, few and many channels."""
    d = choose.choice([1, 1, 2, 2, 2, 3])
    geometry = Geometry(
        *(
            tuple(choose.choice(options) for _ in range(d))
            for options in ([1, 2, 3, 4][: 5 - d], [1, 1, 2, 3, 5], [0, 0, 1, 2], [1, 1, 2, 4])
        )
    )
    sizes = [
        max(1, geometry.reach(i) - 2 * geometry.padding[i]) + choose.choice([0, 0, 1, 2, 5])
        for i in range(d)
    ]
    if choose.random() < 0.2:
        sizes[-1] += choose.choice([62, 63, 64, 65, 130])  # around a tile
    groups = choose.choice([1, 1, 1, 2, 3])
    return Case(
        geometry=geometry,
        sizes=tuple(sizes),
        batch=choose.choice([0, 1, 1, 2, 3]),
        groups=groups,
        in_channels=groups * choose.choice([1, 2, 3, 7, 8, 9, 17]),
        out_channels=groups * choose.choice([1, 2, 7, 8, 9, 17]),
        layout=choose.choice(LAYOUTS),
        seed=choose.randrange(1 << 31),
    )


@pytest.mark.parametrize("param", ["cpu", "cpu in 3 threads"])
def test_small_layers(
    request: pytest.FixtureRequest, device: torch.device, fresh_seed: int, param: str
):
    if device.type != "cpu" or cpu.library() is None:
        pytest.skip("needs the C kernels")
    count = 100 if request.config.getoption("--kernels") is None else 1500
    choose = random.Random(fresh_seed)
    # A process that dies takes its output with it, and pytest-xdist names only the test.
    last = LAST_CASES / f"{param}, process {os.getpid()}.txt"
    last.parent.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        case, p = random_case(choose), choose.choice([0.0, 0.3])
        masked, with_bias, *needs = (choose.random() < 0.6 for _ in range(5))
        slope = choose.choice([None, 0.0, 0.0, 0.2])
        options = Settings(case.geometry, case.groups, p, masked and p > 0, EPS, slope)
        dtype, of_grad = choose.choice(DTYPES["cpu"]), choose.choice(LAYOUTS + EXPANDED)
        last.write_text(
            f"--seed {fresh_seed}, {param}, case {i}: {case}, {dtype}, {options}, "
            f"{of_grad}, {with_bias}, {needs}\n"
        )
        check_layer(Subject(param, device), case, dtype, options, of_grad, with_bias, needs)
    last.unlink()
