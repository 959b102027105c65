"""Loads the C kernels, and gives them the threads of PyTorch's OpenMP runtime."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["PATH", "Call", "Library", "StridedTensor", "library", "load"]

_log = logging.getLogger(__name__)

PATH = Path(__file__).with_name("kernels.dll" if os.name == "nt" else "kernels.so")
"""Where the installation builds the library."""


class StridedTensor(ctypes.Structure):
    """A pointer, and the strides of samples, pixels and channels in elements; as in kernels.c."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sample", "pixel", "channel")),
    ]


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Call(ctypes.Structure):
    """The arguments of all functions; the C struct of the same name."""

    _fields_ = [
        *_fields(
            ctypes.c_int64, "dtype threads dims samples channels scratch activation threshold"
        ),
        *_fields(ctypes.c_int64 * 3, "sizes positions kernel stride padding dilation"),
        *_fields(ctypes.c_double, "mean square eps grad_mean grad_var slope"),
        *_fields(StridedTensor, "x grad out"),
        *_fields(ctypes.c_void_p, "keys mu rstd offset means sums rest bias pair"),
        *_fields(ctypes.c_void_p, "grad_bias grad_sums workspace"),
    ]


class Library(NamedTuple):
    """The functions of kernels.c, without their prefix."""

    window_statistics: Any
    epilogue: Any
    epilogue_backward: Any
    statistics_backward: Any


def load(path: Path) -> Library:
    """Load the kernels from a file.

    Raises:
        OSError: the file does not exist, is no library for this machine, or was built from other
            sources than those beside it.
    """
    dll = ctypes.CDLL(str(path))
    _check_sources(dll, path)
    dll.kernelnorm_set_threads.argtypes = [ctypes.c_void_p] * 3
    dll.kernelnorm_set_threads(*_openmp())
    functions = [getattr(dll, f"kernelnorm_{name}") for name in Library._fields]
    for function in functions:
        function.argtypes, function.restype = [ctypes.POINTER(Call)], None
    return Library(*functions)


@functools.cache
def library() -> Library | None:
    """The installed kernels, or ``None`` if there are none; warns once about that."""
    try:
        return load(PATH)
    except (OSError, AttributeError) as error:  # missing, or without the functions
        reason = str(error) if PATH.exists() else "no C compiler worked at installation"
        _log.warning(
            "no C kernels (%s), so KNConvs are slower on this CPU. With a compiler, such as GCC: "
            "pip install --force-reinstall --no-cache-dir --no-deps kernelnorm",
            reason,
        )
        return None


def _check_sources(dll: ctypes.CDLL, path: Path) -> None:
    """Check that the library was built from the sources beside it, if they are there.

    In a checkout they may be newer: then the arguments could have another layout.
    """
    sources = [path.with_name(name) for name in ("kernels.c", "loops.h")]
    if all(source.exists() for source in sources):
        expected = zlib.crc32(b"".join(source.read_bytes() for source in sources))
        dll.kernelnorm_sources.restype = ctypes.c_uint32
        if dll.kernelnorm_sources() != expected:
            raise OSError(f"{path.name} was built from other sources: install again")


def _openmp() -> list[int | None]:
    """The functions of PyTorch's OpenMP runtime that the kernels call.

    A second runtime in the process would compete with it for the cores, so the kernels link none.
    If none is found, they run on a single thread.
    """
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    folder = Path(torch.__file__).parent / "lib"
    for place in (None, *map(str, sorted(folder.glob("lib*omp*")))):
        with contextlib.suppress(AttributeError, OSError, TypeError):  # TypeError: None on Windows
            runtime = ctypes.CDLL(place)
            return [ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in names]
    return [None] * 3
