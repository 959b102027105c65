"""Keeps the freed memory of a training process for the next tensors.

By default glibc returns large blocks to the system as soon as they are freed. Every training step
on the CPU then requests them again, and the system fills each page with zeros.
"""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_freed_memory"]

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, for the rest of this process.

    Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)  # no mapped blocks: these are unmapped when they are freed
    mallopt(_M_TRIM_THRESHOLD, -1)  # never trim
    mallopt(_M_TOP_PAD, 2**26)
