"""Facts about this machine that need no other package: its processor, the user's cache folder."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cpu_name", "describe_cpu", "user_cache"]


def user_cache() -> Path:
    """Return this package's folder in the user's cache, which takes what a data folder cannot."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "kernelnorm"


def describe_cpu() -> dict[str, str]:
    """Return the fields of the first core in /proc/cpuinfo; nothing if there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))  # the first core replaces the others
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """Return the processor's name, or at least its architecture."""
    return describe_cpu().get("model name") or platform.processor() or platform.machine()
