"""Runs the app in Flower's simulation, on its own SuperLink, and stops the SuperLink at the end.

    python examples/federated/run.py
    python examples/federated/run.py --run-config "norm='batch' partition='dirichlet' alpha=0.1"
    python examples/federated/run.py --federation-config "num-supernodes=4"

The arguments are those of ``flwr run``, which alone would leave a SuperLink running. Flower's files
go to $FLWR_HOME, by default runs/federated, and so does the run's state unless ``out`` is given.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

APP = Path(__file__).parent
MARKS = [f"KERNELNORM_FEDERATED_SUPERLINK_{i}" for i in range(8)]
"""Environment variables that mark the processes of a SuperLink. There are several, since Ray's
agents write their names over a part of their environment in /proc."""
START_SECONDS = 60.0
"""Time that a SuperLink has to start."""
END_SECONDS = 10.0
"""Time that a process has to end by itself."""


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes; it forbids telemetry and installations.

    The user's OMP_NUM_THREADS and PYTHONWARNINGS are kept.
    """
    return {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore:Tip:FutureWarning",  # Ray warns of a new default
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def started(
    command: Sequence[str], env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command as a group of processes, and end all of them after the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes], first: signal.Signals = signal.SIGTERM) -> None:
    """End the group of processes that ``process`` leads, with SIGKILL if they do not end."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, first)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def ending(value: str) -> Iterator[None]:
    """After the block, end all processes with a value in their environment; on Linux only."""
    try:
        yield
    finally:
        # Processes may start others in the meantime, so the search is repeated.
        for number in (signal.SIGTERM, signal.SIGKILL):
            limit = time.monotonic() + END_SECONDS
            while (left := having(value)) and time.monotonic() < limit:
                for process in left:
                    with suppress(ProcessLookupError):
                        os.kill(process, number)
                time.sleep(0.5)


def having(value: str) -> list[int]:
    """Return the processes that were started with an environment variable of this value."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"={value}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


@contextmanager
def superlink(env: Mapping[str, str], *options: str) -> Iterator[int]:
    """Start a SuperLink that listens on this machine only, and yield its port.

    After the block its child processes end, too: a simulation would train until its last round.

    Raises:
        RuntimeError: the SuperLink does not start; the message has the end of its log.
    """
    port = free_port()
    mark = str(uuid.uuid4())
    env = {**env, **dict.fromkeys(MARKS, mark)}
    log = Path(env["FLWR_HOME"], "superlink.log")
    address = ["--insecure", "--host", "127.0.0.1", "--port", str(port)]
    with (
        ending(mark),
        started(["flower-superlink", *address, *options], env, log) as process,
    ):
        limit = time.monotonic() + START_SECONDS
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"the SuperLink does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield port


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError):
        return False


def flwr(
    env: Mapping[str, str], *arguments: str, stdout: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Flower's command."""
    return subprocess.run(["flwr", *arguments], env=env, stdout=stdout, text=True, check=True)


def status(env: Mapping[str, str]) -> str:
    """Return the status of the SuperLink's last run, such as ``"finished:completed"``."""
    answer = flwr(env, "list", "--format", "json", stdout=subprocess.PIPE).stdout
    return str(json.loads(answer)["runs"][0]["status"])


def check(arguments: Sequence[str]) -> None:
    """Check the run configuration here, as starting Flower takes a while.

    Raises:
        OSError: the file of the configuration cannot be read.
        ValueError: see :class:`kernelnorm_federated.settings.Settings`.
        click.ClickException: Flower cannot read the configuration.
    """
    import tomllib
    from flwr.common.config import parse_config_args
    from kernelnorm_federated.settings import Settings

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--run-config", action="append", default=[])
    given = parser.parse_known_args(arguments)[0].run_config
    for text in given:
        if text and "=" not in text and not text.endswith(".toml"):
            raise ValueError(f"--run-config {text!r}: expected KEY=VALUE, or a file of TOML")
    app = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    Settings.from_run_config({**app["config"], **parse_config_args(given)})


def stop(number: int, _: object) -> None:
    """End the program as Ctrl-C does."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        importlib.import_module("kernelnorm_federated")
    except ModuleNotFoundError as error:
        sys.exit(str(error))
    import click

    try:
        check(arguments)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except click.ClickException as error:
        sys.exit(error.message)
    home = Path(os.environ.get("FLWR_HOME") or "runs/federated").absolute()
    home.mkdir(parents=True, exist_ok=True)
    env = environment(home)
    try:
        with superlink(env, "--simulation") as port:
            env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(port)
            flwr(env, "run", str(APP), "--stream", *arguments)
            result = status(env)
    except subprocess.CalledProcessError as error:  # Flower has printed the reason
        sys.exit(error.returncode)
    except RuntimeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command resumes after the last finished round")
    if result != "finished:completed":
        sys.exit(f"the run has not been completed: {result}. The output above tells why")


if __name__ == "__main__":
    main(sys.argv[1:])
