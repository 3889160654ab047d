"""Processes that are measured: CPU time, user and system, of a process and of all that it started, and its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Used:
    """What a process took."""

    cpu: float
    """seconds"""
    memory: int
    """bytes that were resident at most, of the process itself"""


def used_by(
    command: Sequence[str], log: str | Path = os.devnull, environment: Mapping[str, str] | None = None
) -> Used:
    """Run a command in the repository; SystemExit with the end of its log when it fails."""
    if not hasattr(os, "wait4"):
        raise SystemExit("what a process takes is measured on Linux and macOS alone")
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, **(environment or {})}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here, and needs no other wait
    if status:
        told = "" if str(log) == os.devnull else Path(log).read_text(errors="replace")[-4000:]
        raise SystemExit(f"{' '.join(map(str, command))} failed\n{told}".strip())
    kilobytes = usage.ru_maxrss if sys.platform != "darwin" else usage.ru_maxrss // 1024
    return Used(usage.ru_utime + usage.ru_stime, kilobytes * 1024)


def cpu_seconds(command: Sequence[str]) -> float:
    return used_by(command).cpu
