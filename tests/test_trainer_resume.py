"""A run goes on where it was stopped, or says why it cannot."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernelnorm.experiments import state, trainer
from kernelnorm.experiments.data import Images
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.trainer import train
from tests.processes import wait_for
from tests.small_runs import (
    assert_same_weights,
    command,
    on,
    photos,
    small,
    weights,
    without_times,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "sign"),
    [
        pytest.param("kernel", "last.ckpt", id="within the first epoch"),
        pytest.param("batch", "best.ckpt", id="as the first epoch ends"),
    ],
)
def test_killed_run_ends_with_the_same_weights(
    norm: str, sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(norm, epochs=20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [*command(killed, norm), "--epochs=20"],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for((killed / sign).exists)
        process.send_signal(signal.SIGSTOP)  # or it would be over before it is killed
        with pytest.raises(RunError, match=f"another process trains in {killed}"):
            train(config, Launch(out=killed))
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    train(config, Launch(out=whole, verbose=False))
    capsys.readouterr()
    train(config, Launch(out=killed))
    # Every step saved a checkpoint. Between two epochs the message names no step.
    assert re.search(r"resuming .* after (step [1-8] of )?epoch [1-9]", capsys.readouterr().out)
    assert_same_weights(whole, killed)
    assert without_times(whole) == without_times(killed)


@pytest.mark.parametrize("stops", [[3], [8], [2, 5, 11]])
def test_run_paused_in_and_between_epochs_ends_with_the_same_weights(
    stops: list[int], tmp_path: Path
) -> None:
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    config = replace(small(), augment=True, standardise=True)  # 8 steps an epoch
    train(config, Launch(out=whole, verbose=False))
    for stop in stops:
        train(config, Launch(out=paused, max_steps=stop, verbose=False))
        assert len(RunFolder(paused).read_metrics()) == stop // 8
    train(config, Launch(out=paused, verbose=False))
    assert_same_weights(whole, paused)
    assert without_times(whole) == without_times(paused)


@pytest.mark.parametrize("lost", ["best.ckpt", "metrics.jsonl"])
def test_a_run_that_is_killed_between_its_files_gets_the_others_back(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(small(), Launch(out=whole, verbose=False))

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    place = state if lost == "best.ckpt" else RunFolder
    monkeypatch.setattr(place, "_save_best" if lost == "best.ckpt" else "write_metrics", kill)
    with pytest.raises(KeyboardInterrupt):
        train(small(), Launch(out=killed, verbose=False))
    monkeypatch.undo()
    assert (killed / "best.ckpt").exists() == (lost == "metrics.jsonl")
    folder = train(small(), Launch(out=killed, verbose=False, max_steps=8))
    best = folder.load("best.ckpt")
    assert best is not None
    assert best["epoch"] == len(folder.read_metrics()) == 1
    train(small(), Launch(out=killed, verbose=False))
    assert_same_weights(whole, killed)
    for name, tensor in weights(whole, "best.ckpt").items():
        assert torch.equal(tensor, weights(killed, "best.ckpt")[name])


def test_metrics_are_had_back_from_the_checkpoint(tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, max_steps=12, verbose=False))
    before = folder.read_metrics()
    (tmp_path / "metrics.jsonl").unlink()
    train(small(), Launch(out=tmp_path, verbose=False))
    assert folder.read_metrics()[:-1] == before


@pytest.mark.parametrize("lines", [0, 1])
def test_finished_run_gets_its_lost_metrics_back(lines: int, tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, verbose=False))
    before = folder.read_metrics()
    checkpoint = (tmp_path / "last.ckpt").read_bytes()
    if lines:
        folder.write_metrics(before[:lines])
    else:
        (tmp_path / "metrics.jsonl").unlink()
    train(small(), Launch(out=tmp_path, verbose=False))
    assert folder.read_metrics() == before
    assert (tmp_path / "last.ckpt").read_bytes() == checkpoint


def test_finished_run_without_its_checkpoint_begins_anew(tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, verbose=False))
    before, final = without_times(tmp_path), weights(tmp_path)
    (tmp_path / "last.ckpt").unlink()
    train(small(), Launch(out=tmp_path, max_steps=3, verbose=False))
    assert folder.read_metrics() == []
    train(small(), Launch(out=tmp_path, verbose=False))
    assert without_times(tmp_path) == before
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(tmp_path).items())


def test_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(), Launch(out=tmp_path, verbose=False))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    train(small(), Launch(out=tmp_path))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    assert "is finished, after 2 epochs" in capsys.readouterr().out


def test_another_configuration_is_an_error(tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    with pytest.raises(RunError, match=r"norm is 'kernel' there and 'batch' here; lr is .* --out"):
        train(small("batch"), Launch(out=tmp_path))


def test_a_folder_older_than_a_field_is_the_same_run(tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    content = folder.read_config()
    del content["run"]["precision"]
    folder.write_config(content)
    train(small(), Launch(out=tmp_path, max_steps=2, verbose=False))
    with pytest.raises(RunError, match="precision is '32-true' there and 'bf16-mixed' here"):
        train(small(precision="bf16-mixed"), Launch(out=tmp_path))


@pytest.mark.parametrize("content", ["norm: kernel\n", "run:\n"])
def test_config_of_no_run_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(RunError, match="has no section 'run'"):
        train(small(), Launch(out=tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images.subset(59), "train_images was 60 and is 59; test_images was 60"),
        (lambda images: replace(images, classes=("a", "b")), r"classes was \['0', .*\['a', 'b'\]"),
        (
            lambda images: replace(images, pixels=images.pixels[..., :4]),
            r"image_shape was \[1, 8, 8\] and is \[1, 8, 4\]",
        ),
    ],
    ids=["fewer images", "other classes", "another shape"],
)
def test_changed_data_is_an_error(
    change: Callable[[Images], Images],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    load = trainer.load_split
    monkeypatch.setattr(trainer, "load_split", lambda *a: change(load(*a)))
    with pytest.raises(RunError, match=rf"the data of .* has changed: {message}"):
        train(small(), Launch(out=tmp_path))


def test_a_finished_run_is_refused_for_other_images(tmp_path: Path) -> None:
    one, two = (photos(tmp_path / place / "photos", label=place) for place in ("cat", "bird"))
    assert on(one).name == on(two).name
    launch = Launch(out=tmp_path / "run", verbose=False)
    train(on(one), launch)
    moved = one.rename(tmp_path / "moved")
    train(on(moved), launch)
    with pytest.raises(RunError, match=r"the data of .* has changed: classes was .*'cat'"):
        train(on(two), launch)


def test_images_may_change_before_anything_is_trained(tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    (tmp_path / "last.ckpt").unlink()
    folder = train(small(subset=50), Launch(out=tmp_path, max_steps=1, verbose=False))
    assert folder.read_config()["train_images"] == 50


def test_a_run_that_resumes_elsewhere_lists_both_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launch(out=tmp_path, max_steps=1, verbose=False)
    first = train(small(), launch).read_config()["environment"]
    monkeypatch.setattr(trainer, "environment", lambda *_: {"device": "another"})
    for _ in range(2):
        content = train(small(), launch).read_config()
        assert content["environment"] == first
        assert content["later_environments"] == [{"device": "another"}]


def test_a_pause_tells_the_steps_that_were_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for max_steps, line in ((1, "paused after 1 step:"), (3, "3 steps:"), (2, "3 steps:")):
        train(small(), Launch(out=tmp_path, max_steps=max_steps))
        assert line in capsys.readouterr().out


def test_another_process_in_the_folder_is_an_error(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).lock(),
        pytest.raises(RunError, match=f"another process trains in {tmp_path}"),
    ):
        train(small(), Launch(out=tmp_path))
    (tmp_path / ".last.ckpt.01234567.part").write_bytes(b"of a process that was killed")
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_begins_while_another_is_checked_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = trainer.build_network

    def slow_build(*args: Any, **options: Any) -> nn.Module:
        monkeypatch.setattr(trainer, "build_network", build)
        with torch.device("cpu"):  # the other process has no device set
            train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
        return build(*args, **options)

    monkeypatch.setattr(trainer, "build_network", slow_build)
    with pytest.raises(RunError, match=r"holds another run: lr is .* there and .* here"):
        train(replace(small(), lr=0.2), Launch(out=tmp_path, verbose=False))
    assert RunFolder(tmp_path).read_config()["run"]["lr"] == small().lr


@pytest.mark.parametrize("content", [torch.ones(3), [1], {"model": None}])
def test_what_is_no_checkpoint_is_named(content: Any, tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(RunError, match=r"last\.ckpt is no checkpoint of a run"):
        train(small(), Launch(out=tmp_path))


def flipped(content: bytes) -> bytes:
    """With another bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda _: b"rubbish", lambda content: content[:-1000], flipped]
)
def test_damaged_checkpoint_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    file = tmp_path / "last.ckpt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match=r"last\.ckpt is damaged .* delete it to start"):
        train(small(), Launch(out=tmp_path))


def test_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    state = folder.load("last.ckpt")
    assert state is not None
    folder.save("last.ckpt", {**state, "model": {}})
    with pytest.raises(RunError, match=r"last\.ckpt does not fit this run"):
        train(small(), Launch(out=tmp_path))
    folder.save("last.ckpt", {**state, "optimizer": None})
    with pytest.raises(RunError, match=r"last\.ckpt does not fit this run"):
        train(small(), Launch(out=tmp_path))
    folder.save("last.ckpt", {**state, "rng": state["rng"] * 2})
    with pytest.raises(RunError, match="started with 2 processes and can resume only with 2, not"):
        train(small(), Launch(out=tmp_path))


def test_checkpoint_without_config_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(RunError, match=r"has a checkpoint but no config\.yaml"):
        train(small(), Launch(out=tmp_path))
