"""Loads the C kernels, and gives them the threads of PyTorch's OpenMP runtime."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["PATH", "Call", "Library", "Strides", "library", "load"]

_log = logging.getLogger(__name__)

PATH = Path(__file__).with_name("kernels.dll" if os.name == "nt" else "kernels.so")
"""Where the installation builds the library."""


_LONGS = "dtype threads dims samples channels groups"
_DIMENSIONS = "sizes positions kernel stride padding dilation"
_FACTORS = "mean square dropout_variance eps grad_mean grad_var"


class Call(ctypes.Structure):
    """Everything about a call that is not a pointer; the C struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _LONGS.split()),
        *((name, ctypes.c_int64 * 3) for name in _DIMENSIONS.split()),
        *((name, ctypes.c_int64) for name in ("scratch", "relu", "keep_threshold")),
        *((name, ctypes.c_double) for name in _FACTORS.split()),
    ]


class Strides(ctypes.Structure):
    """Strides of samples, pixels and channels in elements; the C struct of the same name."""

    _fields_ = [(name, ctypes.c_int64) for name in ("sample", "pixel", "channel")]


_CALL, _STRIDES, _POINTER = ctypes.POINTER(Call), ctypes.POINTER(Strides), ctypes.c_void_p
_LARGE = [_POINTER, _STRIDES]
_FUNCTIONS = {
    "window_statistics": [_CALL, *_LARGE, *[_POINTER] * 6],
    "epilogue": [_CALL, *_LARGE * 2, *[_POINTER] * 6],
    "epilogue_backward": [_CALL, *_LARGE * 3, *[_POINTER] * 8],
    "statistics_backward": [_CALL, *_LARGE * 2, *[_POINTER] * 3],
}


class Library(NamedTuple):
    """The C functions, each with the signature of ``kernelnorm_<name>`` in kernels.c."""

    window_statistics: Any
    epilogue: Any
    epilogue_backward: Any
    statistics_backward: Any


def load(path: Path) -> Library:
    """Loads the kernels from a file.

    Raises:
        OSError: the file does not exist or is no library for this machine.
    """
    dll = ctypes.CDLL(str(path))
    dll.kernelnorm_set_threads.argtypes = [_POINTER] * 3
    dll.kernelnorm_set_threads(*_openmp())
    functions = {}
    for name, arguments in _FUNCTIONS.items():
        function = getattr(dll, f"kernelnorm_{name}")
        function.argtypes, function.restype = arguments, None
        functions[name] = function
    return Library(**functions)


@functools.cache
def library() -> Library | None:
    """The installed kernels, or ``None`` if there are none; warns once about that."""
    try:
        return load(PATH)
    except OSError as error:
        reason = str(error) if PATH.exists() else "the installation found no C compiler"
        _log.warning(
            "no C kernels (%s), so KNConvs are slower on this CPU. "
            "Install a compiler, then: pip install --force-reinstall --no-deps kernelnorm",
            reason,
        )
        return None


def _openmp() -> list[int | None]:
    """The functions of PyTorch's OpenMP runtime that the kernels call.

    A second runtime in the process would fight with it for the cores, so the kernels link none.
    Without one they run on a single thread.
    """
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    folder = Path(torch.__file__).parent / "lib"
    for place in (None, *map(str, sorted(folder.glob("lib*omp*")))):
        with contextlib.suppress(AttributeError, OSError):
            runtime = ctypes.CDLL(place)
            return [ctypes.cast(getattr(runtime, name), _POINTER).value for name in names]
    return [None] * 3
