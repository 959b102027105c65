"""The app on Flower's own processes: its simulation, and a SuperLink with two SuperNodes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import run as launcher
import tomllib
import torch
from conftest import APP, ROOT
from flwr.app import Error, Message
from kernelnorm_federated.local import LocalGrid, run, run_config
from kernelnorm_federated.server_app import serve
from kernelnorm_federated.settings import Settings

Make = Callable[..., Settings]
LIMIT_SECONDS = 400
PAGE = (ROOT / "docs" / "federated.md").read_text()


def quiet(_: str) -> None:
    """Says nothing."""


def run_config_option(settings: Settings) -> str:
    """The settings as ``flwr run`` takes them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in run_config(settings).items())


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder for Flower's files. Fails if a process is left, and ends it."""
    folder = tmp_path / "flower"
    folder.mkdir()
    yield folder
    end = time.monotonic() + 20
    while (left := launcher.having(str(folder))) and time.monotonic() < end:
        time.sleep(0.2)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


def assert_near(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of additions in a convolution."""
    assert {*first} == {*second}
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-5, rtol=1e-4)


def state_of(settings: Settings) -> dict[str, object]:
    return torch.load(settings.folder / "state.pt", weights_only=True)


def launch(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, APP / "run.py", *arguments],
        env={**os.environ, "FLWR_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def test_the_simulation_gives_the_rounds_of_one_process_and_resumes(
    settings: Make, home: Path
) -> None:
    choice = settings(norm="batch", clients=4, num_server_rounds=2, timeout=200.0)
    expected = run(settings(norm="batch", clients=4, out=f"{choice.out}-local"), quiet)
    first = launch(home, "--run-config", run_config_option(choice))
    assert first.returncode == 0, first.stdout + first.stderr
    assert [*map(int, re.findall(r"^round (\d)/2: accuracy .*4 clients,", first.stdout, re.M))] == [
        1,
        2,
    ]
    longer = run_config_option(settings(norm="batch", clients=4, timeout=200.0))
    four = ("--federation-config", "num-supernodes=4")
    second = launch(home, "--run-config", longer, *four)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resuming after round 2" in second.stdout
    assert "round 3/3" in second.stdout
    state = state_of(choice)
    assert len(state["history"]) == 3
    assert_near(state["network"], expected.network)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_no_process(
    settings: Make, home: Path, number: signal.Signals
) -> None:
    choice = settings(num_server_rounds=10_000, timeout=200.0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a shell may ignore it
    command = [sys.executable, str(APP / "run.py"), "--run-config", run_config_option(choice)]
    log, env = home / "run.log", {**os.environ, "FLWR_HOME": str(home)}
    with launcher.started(command, env, log) as process:
        wait_for(lambda: bool(rounds_of(choice)), process, log)
        process.send_signal(number)
        assert process.wait(60) == 1
        assert "stopped: the same command resumes" in log.read_text()
        assert not launcher.having(str(home))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run-config", "learning-rate=-1"], "run-config learning-rate=-1.0: expected above 0"),
        (["-c", "learning-rate=-1"], "run-config learning-rate=-1.0: expected above 0"),
        (["--run-config=learning-rate=-1"], "run-config learning-rate=-1.0: expected above 0"),
        (["--run-config", "norm=kernel"], "string is in an invalid format"),
        (["--run-config", "norm --"], "--run-config 'norm --': expected KEY=VALUE"),
        (["--run-config", "missing.toml"], "No such file or directory: 'missing.toml'"),
    ],
)
def test_a_wrong_configuration_is_refused_before_flower_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        launcher.main(arguments)
    assert message in str(stopped.value)
    assert not (tmp_path / "flower").exists()


def commands(section: str, language: str = "sh") -> list[str]:
    """The lines of the blocks in a section of the page, up to the next heading."""
    text = PAGE.split(f"# {section}\n")[1].split("\n#")[0]
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


@dataclass
class Replayed(LocalGrid):
    """A grid in which the same clients fail as in a run that has been recorded."""

    answered: list[set[int]] = field(default_factory=list)

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train":
            config = message.content["config"]
            if config["client"] not in self.answered[config["server-round"] - 1]:
                return Message(Error(1, "killed"), reply_to=message)
        return super().answer(message)


def rounds_of(settings: Settings) -> list[set[int]]:
    """The clients that answered in each round so far."""
    file = settings.folder / "rounds.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{*map(int, json.loads(line)["images"])} for line in lines]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def listens(port: str) -> bool:
    """Whether a process accepts connections on a port."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=1):
        return True
    return False


def options(line: str) -> list[str]:
    """The words of a command, without those that choose the encryption and the addresses."""
    about = r" --(insecure|host|ssl-\S+|root-certificates|superlink|port)( [^-\s]\S*)?"
    return shlex.split(re.sub(about, "", line), comments=True)


def test_the_trial_on_one_machine_differs_from_several_in_the_encryption_only() -> None:
    trial = [options(line) for line in commands("A trial on one machine")]
    assert trial == [options(line) for line in commands("Between machines")[2:]]
    one, several = (
        tomllib.loads("\n".join(commands(section, "toml")))["superlink"]["ours"]
        for section in ("A trial on one machine", "Between machines")
    )
    assert one == {"address": "127.0.0.1:8000", "insecure": True}
    assert several == {
        "address": "server.example.org:8000",
        "root-certificates": "/federation/ca.crt",
    }


def test_a_run_on_two_supernodes_finishes_after_one_is_killed(settings: Make, home: Path) -> None:
    """The commands are those of the page, with other addresses and a small network."""
    choice = settings(norm="batch", clients=2, num_server_rounds=3, timeout=200.0)
    env, log, port = launcher.environment(home), home / "run.log", str(launcher.free_port())

    def here(line: str) -> list[str]:
        line = line.replace("server.example.org", "localhost").replace("8000", port)
        line = re.sub(r"\b(ca|server)\.(crt|key|pem)\b", rf"{home}/\g<0>", line)
        return shlex.split(line.replace("0.0.0.0", "127.0.0.1"), comments=True)

    (variables,) = commands("On several machines")
    assert {*shlex.split(variables, comments=True)[1:]} <= {f"{k}={v}" for k, v in env.items()}
    authority, certificate, link, *nodes, start = map(here, commands("Between machines"))
    toml = "\n".join(commands("Between machines", "toml"))
    toml = toml.replace("server.example.org:8000", f"localhost:{port}")
    (home / "config.toml").write_text(toml.replace("/federation", str(home)))
    for command in (authority, certificate):
        subprocess.run(command, check=True, capture_output=True)
    with ExitStack() as stack:
        stack.enter_context(launcher.ending(str(home)))
        server = stack.enter_context(launcher.started(link, env, log))
        wait_for(lambda: listens(port), server, log)
        members = []
        for number, command in enumerate(nodes):
            command += ["--port", str(launcher.free_port())]  # on one machine they need two
            member = launcher.started(command, env, home / f"node{number}.log")
            members.append(stack.enter_context(member))
        assert len(members) == 2
        command = [*start, "--run-config", run_config_option(choice)]
        command[2] = str(ROOT / command[2])
        process = stack.enter_context(launcher.started(command, env, log))
        wait_for(lambda: {0, 1} in rounds_of(choice), process, log)
        launcher.end(members[1], signal.SIGKILL)
        wait_for(lambda: len(rounds_of(choice)) == 3, process, log)
        assert process.wait(60) == 0
        answer = launcher.flwr(env, "list", command[3], "--format", "json", stdout=subprocess.PIPE)
        assert json.loads(answer.stdout)["runs"][0]["status"] == "finished:completed"
    answered = rounds_of(choice)
    assert {0, 1} in answered
    assert answered[-1] == {0}
    assert "(without [1])" in log.read_text()
    copy = settings(norm="batch", clients=2, num_server_rounds=3, out=f"{choice.out}-replayed")
    replayed = serve(Replayed(run_config(copy), 2, answered=answered), copy, quiet)
    assert_near(state_of(choice)["network"], replayed.network)
