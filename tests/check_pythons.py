"""The wheel in a fresh environment of each Python on this machine, with the README's example.

Each environment installs PyTorch anew, where pip has no CPU build with gigabytes of CUDA packages,
so this is no part of the other tests: make test-pythons.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.check_packages import ROOT, other_pythons, run
from tests.test_docs import python_blocks


@pytest.mark.parametrize(
    "python", [Path(sys.executable), *other_pythons()], ids=lambda path: path.name
)
def test_readme_example_runs_in_a_fresh_environment(python: Path, tmp_path: Path) -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    run([python, "-m", "venv", "fresh"], tmp_path)
    fresh = tmp_path / "fresh" / "bin" / "python"
    torch = re.findall(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    run([fresh, "-m", "pip", "install", "--quiet", "--no-cache-dir", wheel, *torch], tmp_path)
    example, *_ = python_blocks(ROOT / "README.md")
    backend = "import kernelnorm; print(kernelnorm.backend(torch.zeros(1, 1, 1)))"
    printed = run([fresh, "-c", f"{example}\n{backend}"], tmp_path)
    shutil.rmtree(tmp_path / "fresh")
    assert printed.split()[0] == "cpu"  # a warning about NumPy follows
