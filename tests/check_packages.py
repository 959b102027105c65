"""The packages that a release consists of, installed where nothing else of the checkout is.

Building takes a while, so this is no part of the other tests: make wheel-check.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import kernelnorm
from kernelnorm.ops.backends.cpu.library import Library

ROOT = Path(__file__).parent.parent
FOLDER = "kernelnorm/ops/backends/cpu"
SOURCES = {f"{FOLDER}/kernels.c", f"{FOLDER}/loops.h"}
LIBRARY = f"{FOLDER}/kernels.{'dll' if os.name == 'nt' else 'so'}"
IGNORED = [f"docs/results/federated/{name}" for name in (".lock", "states/run/state.pt")]
"""Files of unfinished runs, which git ignores."""
LAYER = """
import kernelnorm, torch

x = torch.randn(2, 3, 8, 8)
layer = kernelnorm.KNConv2d(3, 4, 3, activation="relu")
layer(x).sum().backward()
assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
print(kernelnorm.__file__, kernelnorm.backend(x))
"""


def run(command: Sequence[str | Path], folder: Path, **variables: str) -> str:
    """Run a command in a folder and return what it prints."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def pip(*arguments: str | Path, folder: Path, **variables: str) -> str:
    return run([sys.executable, "-m", "pip", "--quiet", *arguments], folder, **variables)


def build_wheel(sdist: Path, folder: Path, **variables: str) -> Path:
    pip("wheel", "--no-deps", f"--wheel-dir={folder}", sdist, folder=folder, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


def try_layer(wheel: Path, folder: Path) -> tuple[str, str]:
    """Installs a wheel in a folder of its own, and returns the backend there and all messages."""
    site = folder / "site"
    pip("install", "--no-deps", f"--target={site}", wheel, folder=folder)
    first, *messages = run([sys.executable, "-c", LAYER], folder, PYTHONPATH=str(site)).splitlines()
    file, backend = first.split()
    assert Path(file).is_relative_to(site)
    return backend, "\n".join(messages)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made from a copy since setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for file in filter(None, listed.split("\0")):
        if (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes((ROOT / file).read_bytes())
    (folder / LIBRARY).write_bytes(b"a library of other sources")
    for file in IGNORED:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run([sys.executable, "-c", build], folder)
    (file,) = (folder / "dist").glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


def test_source_distribution_has_the_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert SOURCES | {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert LIBRARY not in names


def test_source_distribution_has_what_its_tests_and_documents_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt", "docs/conf.py"}
    expected |= {"tests/conftest.py", "docs/figures/demo.png", "examples/tiles.py"}
    expected |= {".ci/run", ".github/workflows/tests.yml", "docs/results/federated/results.jsonl"}
    assert expected <= names
    assert not {*IGNORED} & names
    assert not [name for name in names if name.endswith((".pyc", ".so", ".dll"))]


def test_packages_have_the_version_of_the_module(sdist: Path, wheel: Path) -> None:
    assert sdist.name == f"kernelnorm-{kernelnorm.__version__}.tar.gz"
    assert wheel.name.split("-")[1] == kernelnorm.__version__


def test_wheel_is_for_every_python_and_one_platform(wheel: Path) -> None:
    name, _, *tags = wheel.stem.split("-")
    assert (name, tags[:-1]) == ("kernelnorm", ["py3", "none"])
    assert tags[-1] == sysconfig.get_platform().replace("-", "_").replace(".", "_")


def test_wheel_has_the_library_and_no_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
    assert {LIBRARY, "kernelnorm/py.typed", "kernelnorm/experiments/paper.toml"} <= names
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_installed_wheel_has_the_c_kernels(wheel: Path, tmp_path: Path) -> None:
    assert try_layer(wheel, tmp_path) == ("cpu", "")


def other_pythons() -> list[Path]:
    """Interpreters of this machine that the package supports, a path for each version."""
    found = {}
    places = [Path(place) for place in os.environ["PATH"].split(os.pathsep)]
    places += (Path.home() / ".pyenv" / "versions").glob("3.*/bin")
    for place in places:
        for python in place.glob("python3.[1-9][0-9]"):
            command = [python, "-c", "import sys; print(sys.version_info[:2])"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip() != str(sys.version_info[:2]):
                found[done.stdout] = python
    return [*found.values()]


@pytest.mark.parametrize("python", other_pythons(), ids=lambda path: path.name)
def test_other_pythons_find_the_functions(python: Path, wheel: Path, tmp_path: Path) -> None:
    """They need not have PyTorch."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(LIBRARY, tmp_path)
    names = [f"kernelnorm_{name}" for name in ("set_threads", *Library._fields)]
    code = f"import ctypes; dll = ctypes.CDLL({library!r}); [getattr(dll, n) for n in {names}]"
    run([python, "-c", code], tmp_path)


def test_without_a_c_compiler_the_layers_run_in_pytorch_operations(
    sdist: Path, tmp_path: Path
) -> None:
    wheel = build_wheel(sdist, tmp_path, CC="/nonexistent/cc")
    with zipfile.ZipFile(wheel) as archive:
        assert LIBRARY not in archive.namelist()
    backend, messages = try_layer(wheel, tmp_path)
    assert backend == "eager"
    assert messages.count("no C compiler worked at installation") == 1
