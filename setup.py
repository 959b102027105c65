"""Builds the C kernels as a plain shared library, which works with any version of Python.

The rest of the metadata is in pyproject.toml. Without a C compiler the installation succeeds, and
the layers run in PyTorch operations.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "kernelnorm/ops/backends/cpu"
WINDOWS = os.name == "nt"
SOURCES = [f"{FOLDER}/kernels.c", f"{FOLDER}/loops.h"]
FUNCTIONS = (
    "sources",
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
        sources = zlib.crc32(b"".join(Path(source).read_bytes() for source in SOURCES))
        ext.define_macros.append(("KERNELNORM_SOURCES", f"{sources}u"))
        try:
            self._build_for_some_processors(ext)
        except Exception as error:  # the compiler is missing or fails
            self._remove_older_library(ext)
            print(
                f"kernelnorm: no C kernels, since no C compiler works here ({error}); "
                "on CPUs the layers run in PyTorch operations, which is slower",
                file=sys.stderr,
            )

    def _build_for_some_processors(self, ext: Extension) -> None:
        """Builds for several processors, or for one if the compiler cannot."""
        try:
            super().build_extension(ext)
        except Exception:
            ext.define_macros.append(("KERNELNORM_ONE_TARGET", None))
            super().build_extension(ext)

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
            SOURCES[:1],
            depends=SOURCES,
            libraries=[] if WINDOWS else ["m"],
            extra_compile_args=["/O2"] if WINDOWS else ["-O3", "-fopenmp-simd", "-g0"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
