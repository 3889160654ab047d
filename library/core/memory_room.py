"""How much main memory there is: to this process, of it, and still to be taken. None where nothing tells it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""what Linux tells of the limits of a container (version 2 of control groups)"""


def available_memory() -> int | None:
    """Bytes that are free, or hold nothing but copies of files: of the machine, or of its container where that has
    less."""
    try:
        import psutil  # of accelerate
    except ImportError:
        return None
    found = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, KeyError):  # no limit, another system
        limit, used = _limit(), int((GROUP / "memory.current").read_text())
        parts = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        found = min(found, limit - used + int(parts["inactive_file"]))
    return max(found, 0)


def total_memory() -> int | None:
    """Bytes of the machine, or of its container where that has less."""
    try:
        import psutil
    except ImportError:
        return None
    found = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        found = min(found, _limit())
    return found


def resident_memory() -> int | None:
    """Bytes that this process has now."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def _limit() -> int:
    return int((GROUP / "memory.max").read_text())  # the word "max" where there is none
