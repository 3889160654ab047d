"""Several processes of one run, forked from the process of the tests: all that it has imported is theirs, which is most
of the time that a start of a process takes. What a launcher does is tested with launchers (tests/runs/test_processes.py).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.waiting import PATIENCE

FAILED = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(count: int, action: Callable[[], object], notes: Path, environment: Mapping[str, str] = {}) -> None:
    """Call `action` in `count` processes with the variables that launchers set; AssertionError with what they wrote to
    stderr, which is kept under `notes`, unless each one comes to its end."""
    shared = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    notes.mkdir(parents=True, exist_ok=True)
    paths = [notes / f"rank{rank}.txt" for rank in range(count)]
    running = {
        _forked(action, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, path): rank
        for rank, path in enumerate(paths)
    }
    codes = _waited_for(running)
    assert not any(codes.values()), "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def _forked(action: Callable[[], object], environment: Mapping[str, str], told: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.update(environment)
        sys.stdout = sys.stderr = open(told, "w", encoding="utf-8", buffering=1)
        os.dup2(sys.stderr.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # the tests before ran in one process
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(FAILED)
    os._exit(0)


def _waited_for(running: dict[int, int]) -> dict[int, int]:
    """{rank: exit code} of processes {pid: rank}. When one fails, the others would wait for it: they are killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while running:
        for pid, rank in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[pid]
                codes[rank] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > deadline:
            for pid, rank in running.items():
                os.kill(pid, signal.SIGKILL)
                codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            break
        time.sleep(0.02)
    return codes
