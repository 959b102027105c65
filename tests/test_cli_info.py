"""``kernelnorm info``: what it prints, also where something is missing or broken."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import kernelnorm
from kernelnorm.cli import info, main
from kernelnorm.experiments.data.disk import writable_home
from kernelnorm.ops.backends.cpu import library

KERNELS = sys.modules[library.__module__]  # its package has a function of the same name


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The printed lines by name; those of several lines have them separated by ``|``."""
    main(["info"])
    found: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        name, text = line[:12].strip(), line[12:]
        if name:
            found[name] = text
        else:
            found[[*found][-1]] += f"|{text}"
    return found


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(capsys)
    assert found["kernelnorm"].startswith(f"{kernelnorm.__version__}, ")
    assert found["PyTorch"].startswith(torch.__version__)
    assert f"numpy {sys.modules['numpy'].__version__}" in found["packages"]
    assert found["threads"].startswith(f"{torch.get_num_threads()} of PyTorch; ")
    assert found["data"].startswith(str(Path("data").absolute()))
    assert not [text for text in found.values() if text.startswith("unknown, ")]
    if kernelnorm.backend(torch.ones(1, 1, 1, 1)) == "cpu":
        assert found["C kernels"] == f"compiled, {KERNELS.PATH}"
        expected = "on cpu: cpu for float32, float64, bfloat16; eager for float16"
        assert found["backends"].startswith(expected)


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name in ("opacus", "jsonargparse"):
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(info, "version", version)
    found = lines(capsys)
    assert found["missing"] == "jsonargparse, opacus"
    assert "timm 1.2" in found["packages"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "not compiled: no C compiler worked at installation, so there is no "),
        (b"no library" * 100, "compiled, but cannot be loaded: "),
    ],
    ids=["missing", "no library"],
)
def test_why_there_are_no_c_kernels(
    content: bytes | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "kernels.so"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(KERNELS, "PATH", file)
    library.cache_clear()
    try:
        found = lines(capsys)
    finally:
        library.cache_clear()
    assert found["C kernels"].startswith(expected)
    assert str(file) in found["C kernels"]
    assert found["backends"].startswith("on cpu: eager for float32, ")


def test_cache_is_where_images_go_if_the_data_folder_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    home = writable_home(tmp_path / "data")
    assert lines(capsys)["cache"] == f"{home}, does not exist yet"
    home.mkdir()
    assert lines(capsys)["cache"] == str(home)


def test_it_works_without_pytorch_and_the_packages_of_the_experiments() -> None:
    """Reports of broken installations need it most."""
    code = """
import sys

for module in "torch", "numpy", "jsonargparse", "yaml", "lightning_fabric", "requests", "PIL":
    sys.modules[module] = None
from kernelnorm.cli import main

main(["info"])
"""
    folder = Path(kernelnorm.__file__).parent.parent
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert "\nPyTorch     unknown, ModuleNotFoundError: " in done.stdout
    assert "\npackages    " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("cache       ")
    assert not done.stderr
