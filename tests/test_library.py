"""Finding the C kernels, and doing without them."""

from __future__ import annotations

import ctypes
import logging
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import kernelnorm as kn
from kernelnorm.ops import backends
from kernelnorm.ops.backends import cpu, eager
from kernelnorm.ops.backends.cpu.library import library, load
from tests.oracle import BACKENDS

module = sys.modules[library.__module__]  # its package has a function of the same name

if cpu.library() is None:
    pytest.skip("the installation has no C kernels", allow_module_level=True)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a file the installed library, for this test."""

    def install(path: Path) -> None:
        monkeypatch.setattr(module, "PATH", path)
        library.cache_clear()

    yield install
    monkeypatch.undo()
    library.cache_clear()


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def make() -> tuple[nn.Module, Tensor]:
    layer = kn.KNConv2d(9, 6, 3, stride=2, padding=1, activation="relu", dtype=torch.float64)
    return layer, torch.randn(2, 9, 8, 7, dtype=torch.float64)


def test_the_installed_kernels_are_used():
    assert kn.backend(torch.ones(1, 3, 8, 8)) == "cpu"
    assert library() is library()


def test_a_library_of_other_sources_is_not_used(installed, tmp_path: Path, caplog):
    sources = [module.PATH.with_name(name) for name in ("kernels.c", "loops.h")]
    for file in (module.PATH, *sources):
        shutil.copy(file, tmp_path)
    installed(tmp_path / module.PATH.name)
    assert kn.backend(torch.ones(1, 3, 8, 8)) == "cpu"
    with (tmp_path / "loops.h").open("a") as file:
        file.write("/* newer */")
    installed(tmp_path / module.PATH.name)
    assert kn.backend(torch.ones(1, 3, 8, 8)) == "eager"
    assert "was built from other sources: install again" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no C compiler worked at installation"),
        (b"", "file too short"),
        (b"no library at all" * 100, "invalid ELF header"),
    ],
    ids=["missing", "empty", "no library"],
)
def test_without_them_pytorch_operations_give_the_same(
    installed, tmp_path: Path, caplog, content: bytes | None, reason: str
):
    layer, x = make()
    expected = results(layer, x)
    file = tmp_path / "kernels.so"
    if content is not None:
        file.write_bytes(content)
    installed(file)
    assert kn.backend(x) == "eager"
    torch.testing.assert_close(results(layer, x), expected, rtol=1e-9, atol=1e-9)
    assert kn.backend(x.float()) == "eager"
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.name.startswith("kernelnorm")
    assert reason in record.getMessage()
    assert "pip install" in record.getMessage()


@pytest.mark.parametrize("name", ["libm.so.6", "libc.so.6"])
def test_another_library_is_not_used(installed, caplog, name: str):
    installed(Path(name))
    assert kn.backend(torch.ones(1, 3, 8, 8)) == "eager"
    assert "no C kernels" in caplog.text


def test_a_missing_file_is_an_error_of_load(tmp_path: Path):
    with pytest.raises(OSError, match="kernels"):
        load(tmp_path / "kernels.so")


def test_the_threads_are_those_of_pytorchs_runtime():
    """Its addresses lie in the library that PyTorch has loaded, and there is one runtime."""
    addresses = module._openmp()
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    assert None not in addresses
    files = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if any(begin <= address < end for address in addresses):
            files.add(line.split()[-1])
    (file,) = files
    assert "omp" in file
    assert load(module.PATH)  # twice in a process is fine


def test_the_runtime_is_also_found_where_a_process_cannot_be_searched(monkeypatch):
    """On Windows the process itself, ``None``, is no library."""
    expected = module._openmp()
    assert sys.platform != "linux" or None not in expected

    def cdll(place: str | None) -> ctypes.CDLL:
        if place is None:
            raise TypeError("expected str, got NoneType")
        return ctypes.CDLL(place)

    monkeypatch.setattr(module, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": cdll}))
    assert module._openmp() == expected


def test_without_an_openmp_runtime_there_is_one_thread(installed, monkeypatch, set_threads):
    """Each thread has sums of its own in the workspace of the epilogue's backward."""
    layer, x = kn.KNConv2d(32, 32, 3, padding=1), torch.randn(4, 32, 32, 32)
    empty, sums = cpu._empty, []

    def recorded(shape: tuple[int, ...], *dtype: torch.dtype) -> Tensor:
        made = empty(shape, *dtype)
        if shape == (3 * 4 * 32,):
            sums.append(made)
        return made

    set_threads(3)
    monkeypatch.setattr(cpu, "_empty", recorded)
    expected = results(layer, x)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_openmp", lambda: [None] * 3)
        installed(module.PATH)
        try:
            assert kn.backend(x) == "cpu"
            torch.testing.assert_close(results(layer, x), expected, rtol=1e-3, atol=1e-3)
        finally:
            patched.undo()
            load(module.PATH)  # gives the threads back
    used = [workspace.view(3, -1).any(1).tolist() for workspace in sums]
    assert used == [[True, True, True], [True, False, False]]


def test_names_of_backends(monkeypatch: pytest.MonkeyPatch):
    x = torch.ones(1, 3, 8, 8)
    for dtype, name in (
        (torch.float32, "cpu"), (torch.float64, "cpu"), (torch.bfloat16, "cpu"),
        (torch.float16, "eager"),
    ):  # fmt: skip
        assert kn.backend(x.to(dtype)) == name
    assert kn.backend(x.to("meta")) == "eager"
    assert kn.backend(x[:0]) == "eager"
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert kn.backend(x) == "eager"


def test_threads_that_load_first_at_once(installed, caplog):
    installed(module.PATH)
    layer, x = make()
    layer.eval()
    expected, found = layer(x), []

    def serve() -> None:
        found.append(layer(x))

    library.cache_clear()
    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(y, expected) for y in found)
    assert not caplog.records


def test_every_backend_has_the_primitives_of_the_protocol():
    names = {name for name in vars(backends.Backend) if not name.startswith("_")}
    names |= {*backends.Backend.__annotations__}
    for backend in (eager, *BACKENDS.values()):
        assert names <= {*dir(backend)}
