"""Ctrl-C: one line and exit code 130, at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kernelnorm.cli import main

STOPPED_DURING_AN_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy._core.multiarray":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)  # if these tests run in the background
from kernelnorm.cli import main

main(["train", "--max-steps=1"])
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Stopped. Run the same command to resume.\n"),
        (["compare"], "Stopped. Run the same command to resume.\n"),
        (["sweep"], "Stopped. Run the same command to resume.\n"),
        (["reproduce"], "Stopped. Run the same command to resume.\n"),
        (["evaluate", "run"], "Stopped.\n"),
        (["predict", "run", "x.png"], "Stopped.\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("moment", ["make_parser", "run"])  # the first imports, the second works
def test_ctrl_c_exits_with_130(
    moment: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"kernelnorm.cli.{arguments[0]}.{moment}", stop)
    with pytest.raises(SystemExit, match="130"):
        main(arguments)
    assert capsys.readouterr().err == message


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
def test_ctrl_c_while_pytorch_imports_numpy(tmp_path: Path) -> None:
    """PyTorch drops an exception there."""
    folder = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_DURING_AN_IMPORT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "Stopped. Run the same command to resume.\n"
    assert (done.returncode, done.stdout) == (130, "")
    assert not [*tmp_path.iterdir()]


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    """As of a command in the background of a shell script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match="0"):
            main(["train", "--help"])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_an_exception_again_when_the_command_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers: list[object] = []

    def run(_: object) -> None:
        handlers.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr("kernelnorm.cli.report.run", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(["report", "runs"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.default_int_handler]


def test_output_that_nobody_reads_ends_the_command_without_a_traceback() -> None:
    command = [sys.executable, "-m", "kernelnorm", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, b"")
