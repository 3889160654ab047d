"""Errors of libraries that mean something to the user: full disks, lost loader processes, lost connections between
processes, what torch.compile cannot compile.

Nothing heavy is imported here; errors are known by their kind and text.
"""

from __future__ import annotations

import errno
import os
import re

from library.core.errors import AtelierError, TrainingError
from library.core.write_errors import disk_problem

_LOST_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited unexpectedly)"
)
_SHARED_MEMORY = ("unable to write to file </torch", "unable to open shared memory", "unable to mmap", "bus error")
_FILES = ("received 0 items of ancdata", "too many open files", "unable to open file")
_COMPILERS = ("torch._dynamo.exc", "torch._inductor.exc")
_CONNECTION = re.compile(
    r"connection (?:closed|reset|refused)|gloo|nccl|broken pipe|socket|store|peer|timed? ?out", re.IGNORECASE
)


def failure_of(error: BaseException) -> AtelierError | None:
    """The message for an error that a library raised, or None when it is none of the known ones."""
    text = str(error)
    lost = _LOST_WORKER.search(text)
    if lost is not None:
        return TrainingError(f"a process that loads images was lost ({_how(lost[2])}){_WORKER_HINT}")
    lower = text.lower()
    if isinstance(error, (RuntimeError, OSError)) and any(mark in lower for mark in _SHARED_MEMORY):
        return TrainingError(
            f"there is not enough shared memory (/dev/shm) for the processes that load images{_WORKER_HINT}"
        )
    if isinstance(error, (RuntimeError, OSError)) and any(mark in lower for mark in _FILES):
        return TrainingError(f"too many files are open in this process; raise the limit (ulimit -n 4096){_WORKER_HINT}")
    disk = disk_problem(error)
    if disk is not None:
        return TrainingError(disk)
    if isinstance(error, OSError) and error.filename is not None and error.errno in _PLACES:
        name = str(error.filename)
        return TrainingError(f"{name if len(name) <= 200 else f'{name[:197]}...'} cannot be used: {error.strerror}")
    if type(error).__module__.startswith(_COMPILERS):
        return TrainingError(_why_not_compiled(error))
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1 and _is_lost_connection(error):
        return TrainingError(
            "the connection to another process of this run is lost: it ended, and says why where it was not killed; "
            "this one cannot go on alone"
        )
    return None


_PLACES = frozenset({errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
"""what is wrong with a place that the user named, whichever option it came from"""
_WORKER_HINT = "; take fewer of them with --max_data_loader_n_workers, or none with 0. What was saved before is whole: go on with --resume latest"


def _how(signal_name: str | None) -> str:
    if signal_name is None:
        return "it ended by itself"
    if "bus" in signal_name.lower():
        return "shared memory (/dev/shm) is full"
    if "killed" in signal_name.lower():
        return "something killed it, often the system for lack of memory"
    return f"signal: {signal_name}"


def _why_not_compiled(error: BaseException) -> str:
    """What torch's compiler says, in its first line; the lines behind it are about its own code."""
    told = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"torch.compile cannot compile the blocks of this run: {told[0].rstrip('.:')}. Train or generate without compiled "
        "blocks, without fullgraph, or with another backend (eager needs no compiler of the system)"
    )


def _is_lost_connection(error: BaseException) -> bool:
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None
