"""The heap of a process that trains: memory that tensors have left is kept for the next ones.

By default glibc gives large blocks back to the system as soon as they are free, and every step of a
training on the CPU asks for them again, page by page, filled with zeros.
"""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_freed_memory"]

# Of mallopt, in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Have glibc keep, for the rest of this process, the memory that is freed.

    With another C library nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)  # no blocks of their own, which are unmapped when they are freed
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_TOP_PAD, 2**26)
