"""How much main memory this process may still take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""what Linux tells of the limits of a container (version 2 of control groups)"""


def available_memory() -> int | None:
    """Bytes that are free, or hold nothing but copies of files: of the machine, or of its container where that has
    less; None where nothing tells it."""
    try:
        import psutil  # of accelerate
    except ImportError:
        return None
    found = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, KeyError):  # no limit, another system
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        found = min(found, limit - used + int(parts["inactive_file"]))
    return max(found, 0)
