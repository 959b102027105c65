"""A run that was stopped gives, once resumed, the rounds that it would have given."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import APP
from flwr.app import Message
from kernelnorm_federated import state as state_file
from kernelnorm_federated import task
from kernelnorm_federated.local import LocalGrid, run, run_config
from kernelnorm_federated.server_app import serve
from kernelnorm_federated.settings import Settings
from PIL import Image
from test_federated_rounds import assert_equal, make_photos, quiet

from kernelnorm.experiments.files import Lock

Make = Callable[..., Settings]


class Killed(BaseException):
    """Ends the server, as a signal would."""


@dataclass
class Deadly(LocalGrid):
    """A grid on which the server dies while the second client of round 3 trains."""

    trained: int = 0

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train":
            self.trained += message.content["config"]["server-round"] == 3
            if self.trained == 2:
                raise Killed
        return super().answer(message)


def test_what_a_killed_server_was_writing_is_removed(settings: Make) -> None:
    choice = settings(num_server_rounds=1)
    choice.folder.mkdir(parents=True)
    part = choice.folder / ".state.pt.01234567.part"
    part.write_bytes(b"half of a network")
    run(choice, quiet)
    assert not part.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"strategy": "fedavg", "norm": "kernel"},
        {"strategy": "fedprox", "norm": "fixbn"},
        {"strategy": "fedadam", "norm": "batch", "clients": 6, "fraction_train": 0.5},
    ],
    ids=lambda values: values["strategy"],
)
def test_a_run_that_was_killed_resumes(settings: Make, values: dict[str, Any]) -> None:
    choice = settings(num_server_rounds=5, partition="dirichlet", **values)
    whole = run(replace(choice, out=f"{choice.out}-whole"), quiet)
    with pytest.raises(Killed):
        serve(Deadly(run_config(choice), choice.clients), choice, quiet)
    lines: list[str] = []
    resumed = run(choice, lines.append)
    assert lines[0].startswith("resuming after round 2")
    assert_equal(whole, resumed)
    written = (choice.folder / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == resumed.history


def test_a_finished_run_is_made_longer(settings: Make) -> None:
    choice = settings(num_server_rounds=2)
    whole = run(replace(choice, num_server_rounds=3, out=f"{choice.out}-whole"), quiet)
    run(choice, quiet)
    assert_equal(whole, run(replace(choice, num_server_rounds=3), quiet))


def test_a_finished_run_says_so_and_asks_nobody(settings: Make) -> None:
    choice = settings(num_server_rounds=1)
    first = run(choice, quiet)
    lines: list[str] = []
    assert_equal(first, serve(LocalGrid({}, 0), choice, lines.append))
    assert lines[-1].startswith("accuracy ")


def test_a_state_that_is_being_written_does_not_replace_the_last_one(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = settings(num_server_rounds=2)
    first = run(replace(choice, num_server_rounds=1), quiet)

    def die(_: object, file: Any) -> None:
        file.write(b"half of a file")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(Killed):
            run(choice, quiet)
    saved = state_file.load_state(choice.folder, first.identity)
    assert saved is not None
    assert_equal(saved, first)


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [("seed", 0, 1), ("norm", "batch", "kernel"), ("learning_rate", 0.05, 0.1)],
)
def test_another_run_is_not_resumed(settings: Make, key: str, before: Any, after: Any) -> None:
    choice = settings(num_server_rounds=1, **{key: before})
    run(choice, quiet)
    name = key.replace("_", "-")
    with pytest.raises(ValueError, match=f"{name}={after!r}: expected {before!r}, as in the run"):
        run(replace(choice, **{key: after}), quiet)


def test_a_run_on_other_images_is_not_resumed(settings: Make, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", "abc")
    choice = settings(data=str(photos), num_server_rounds=1, train_images=0)
    run(choice, quiet)
    shutil.rmtree(photos)
    Image.new("RGB", (16, 16), "red").save(make_photos(photos, "abc") / "train" / "a" / "0.png")
    task._load.cache_clear()
    with pytest.raises(ValueError, match="the images are not those of the run in"):
        run(choice, quiet)


def test_fewer_rounds_than_there_are_is_an_error(settings: Make) -> None:
    run(settings(num_server_rounds=2), quiet)
    with pytest.raises(ValueError, match="num-server-rounds=1: expected at least 2, which the"):
        run(settings(num_server_rounds=1), quiet)


def test_a_run_that_another_process_trains_is_left_alone(settings: Make) -> None:
    choice = settings(num_server_rounds=1)
    with Lock(choice.folder / ".lock").hold():
        command = [sys.executable, "-c", RUN, str(APP), json.dumps(run_config(choice))]
        result = subprocess.run(command, capture_output=True, text=True)
    assert "another process trains the run in" in result.stderr
    assert not (choice.folder / "state.pt").exists()


RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from kernelnorm_federated.local import run
from kernelnorm_federated.settings import Settings
run(Settings.from_run_config(json.loads(sys.argv[2])), print)
"""


def test_the_readable_history_is_written_again(settings: Make) -> None:
    choice = settings(num_server_rounds=2)
    run(choice, quiet)
    file = choice.folder / "rounds.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    run(choice, quiet)
    assert file.read_bytes() == whole


def test_a_damaged_state_is_named(settings: Make) -> None:
    choice = settings(num_server_rounds=1)
    run(choice, quiet)
    path = choice.folder / "state.pt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    saved = torch.load(path, weights_only=True)
    others = [{**saved, "network": {}}, {**saved, "history": [3]}, {**saved, "moments": None}]
    for content in (whole[:1000], bytes(flipped), *others):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=r"state.pt cannot be read .*: delete it to begin"):
            run(choice, quiet)


def test_the_state_holds_tensors_and_plain_values_only(settings: Make) -> None:
    choice = settings(strategy="fedadam", norm="batch", num_server_rounds=1)
    run(choice, quiet)
    saved = torch.load(choice.folder / "state.pt", weights_only=True)
    assert {*saved} == {"identity", "network", "moments", "history"}
