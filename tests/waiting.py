"""How tests wait for other processes: no outcome depends on how fast the machine is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

PATIENCE = 1800  # seconds; only a process that hangs meets it, however busy the machine


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until something has happened; the process that brings it about must not have ended."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
