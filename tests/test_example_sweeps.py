"""The sweeps of examples/sweeps: each can be read, and its networks can be made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernelnorm.cli.sweep import make_parser, make_runs
from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.networks import build_network

SWEEPS = sorted((Path(__file__).parent.parent / "examples" / "sweeps").glob("*.yaml"))


def runs_of(sweep: Path) -> list[RunConfig]:
    return make_runs(make_parser().parse_args(["--config", str(sweep)]))


def test_there_are_sweeps():
    assert [sweep.stem for sweep in SWEEPS] == ["dropout", "evaluation", "head", "relu"]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.name)
def test_the_runs_of_a_sweep_are_different_and_their_networks_can_be_made(sweep: Path):
    runs = runs_of(sweep)
    assert len({run.name for run in runs}) == len(runs)
    assert len({run.seed for run in runs}) == 3
    for run in runs:
        with torch.device("meta"):
            build_network(run, num_classes=10, in_channels=3)


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.name)
def test_a_sweep_says_what_it_asks_and_how_it_is_run(sweep: Path):
    question, command, *_ = sweep.read_text().splitlines()
    assert question.startswith("# ")
    assert question.endswith("?")
    assert command == f"# kernelnorm sweep --config examples/sweeps/{sweep.name}"


def test_figure_5_has_the_setup_of_the_papers_last_lines():
    for run in runs_of(SWEEPS[0]):
        assert (run.dataset, run.image_size) == ("imagewoof", 192)
        assert (run.model, run.norm) == ("resnet18", "kernel")
        assert (run.batch_size, run.lr, run.momentum) == (32, 0.01, 0.9)
        assert (run.augment, run.weight_decay, [*run.lr_milestones]) == (False, 0, [])
