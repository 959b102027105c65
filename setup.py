"""Builds the C kernels as a plain shared library, which works with any version of Python.

The rest of the metadata is in pyproject.toml. Without a C compiler the installation succeeds, and
the layers run in PyTorch operations.
"""

from __future__ import annotations

import contextlib
import os
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "kernelnorm/ops/backends/cpu"
WINDOWS = os.name == "nt"
FUNCTIONS = (
    "set_threads",
    "window_statistics",
    "epilogue",
    "epilogue_backward",
    "statistics_backward",
)


class BuildLibrary(build_ext):
    """Builds ``kernels.so``, or ``kernels.dll``, without the name of a Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        """Returns the library's path."""
        return os.path.join(*fullname.split(".")) + (".dll" if WINDOWS else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Returns the functions that the library exports."""
        return [f"kernelnorm_{name}" for name in FUNCTIONS]

    def build_extension(self, ext: Extension) -> None:
        """Builds the library, or says in one line that there is none."""
        try:
            super().build_extension(ext)
        except Exception as error:  # the compiler is missing or fails
            self._remove_older_library(ext)
            print(
                f"kernelnorm: no C kernels, since no C compiler works here ({error}); "
                "on CPUs the layers run in PyTorch operations, which is slower",
                file=sys.stderr,
            )

    def _remove_older_library(self, ext: Extension) -> None:
        """Removes a library from an earlier build: the Python code may not match it."""
        files = [self.get_ext_fullpath(ext.name)]
        if self.editable_mode:
            files.append(self.get_ext_filename(ext.name))
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.remove(file)


class PlatformWheel(bdist_wheel):
    """One wheel per platform: the library is called through ctypes, so any Python can load it."""

    def finalize_options(self) -> None:
        """Marks the wheel as bound to its platform."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Returns the tags of Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "kernelnorm.ops.backends.cpu.kernels",
            [f"{FOLDER}/kernels.c"],
            depends=[f"{FOLDER}/loops.h"],
            libraries=[] if WINDOWS else ["m"],
            extra_compile_args=["/O2"] if WINDOWS else ["-O3", "-fopenmp-simd", "-g0"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
