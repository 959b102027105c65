"""``make federated`` refuses a Python that is too old, before it makes an environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OLD = f"""#!/bin/sh
exec {sys.executable} -c '
import sys
sys.version_info, sys.version = (3, 10, 13), "3.10.13 (main)"
exec(sys.argv[1])' "$2"
"""
NEW = """#!/bin/sh
test "$1" = -c || { echo "called with $@"; exit 1; }
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def make(python: Path, environment: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", f"PYTHON={python}", f"FEDERATED={environment}", f"{environment}/.app"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    done = make(script(tmp_path / "python", OLD), tmp_path / "environment")
    assert done.returncode != 0
    assert "Flower needs Python 3.11 or later, got 3.10.13: make federated PYTHON=" in done.stderr
    assert not (tmp_path / "environment").exists()


def test_an_environment_of_an_old_python_is_made_again(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    script(environment / "bin" / "python", OLD)
    script(environment / "bin" / "pip", OLD)
    done = make(script(tmp_path / "python", NEW), environment)
    assert f"called with -m venv {environment}" in done.stdout
    assert not environment.exists()
