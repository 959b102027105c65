"""What run.py passes on to Flower's processes, and what it says if they cannot start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import run as launcher
from conftest import APP

WITHOUT_FLOWER = """
import runpy, sys
sys.modules["flwr"] = None
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[2]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["run.py", "study.py"])
def test_without_flower_the_command_that_installs_it_is_named(script: str) -> None:
    command = [sys.executable, "-c", WITHOUT_FLOWER, str(APP), str(APP / script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Flower is missing: `make federated`" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "PYTHONWARNINGS"])
def test_variables_of_the_user_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    default = launcher.environment(tmp_path)[name]
    assert default in ("1", "ignore:Tip:FutureWarning")
    monkeypatch.setenv(name, "2")
    assert launcher.environment(tmp_path)[name] == "2"


def test_a_superlink_that_does_not_start_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no port')"]
    started = launcher.started
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    monkeypatch.setattr(launcher, "started", lambda _, env, log: started(command, env, log))
    with pytest.raises(SystemExit) as stopped:
        launcher.main([])
    assert str(stopped.value) == "the SuperLink does not start:\nno port\n"
