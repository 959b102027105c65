"""Private training in two processes: what one process does with the samples of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("opacus")

from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from kernelnorm.privacy import PrivacyEngine
from tests import two_private_processes
from tests.per_sample import assert_close, loader

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Also where one of them has no samples, or both; the noise is added once.

    If a sample of one of them has a gradient that is not finite, both raise the error.
    """
    module = two_private_processes.__name__
    options = ["--standalone", "--nproc-per-node=2", "--module", module, str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for noise, reduction in first:
        network = two_private_processes.network(0)
        alone = two_private_processes.train(network, None, noise, reduction)
        one, other = first[noise, reduction], second[noise, reduction]
        for rank in (one, other):
            for actual, expected in zip(rank["gradients"], alone["gradients"], strict=True):
                for gradient, reference in zip(actual, expected, strict=True):
                    assert_close(gradient, reference)
            for weight, reference in zip(rank["weights"], alone["weights"], strict=True):
                assert_close(weight, reference)
            assert rank["history"] == alone["history"] == [(noise, 0.25, 4)]
        assert all(map(torch.equal, one["weights"], other["weights"]))
        assert not {*one["drawn"].tolist()} & {*other["drawn"].tolist()}
    errors = {(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)}
    assert errors == {"the gradient of a sample is not finite"}
    noise_alone = one["gradients"][-1]  # of a step without samples
    assert all(gradient.abs().max() > 0 for gradient in noise_alone)


def test_other_wrappers_are_refused(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        network = DistributedDataParallel(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="DifferentiallyPrivateDistributedDataParallel"):
            PrivacyEngine().make_private(
                module=network,
                optimizer=SGD(network.parameters(), lr=0.1),
                data_loader=loader(torch.zeros(4, 2), 2),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )
    finally:
        torch.distributed.destroy_process_group()
