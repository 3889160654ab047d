"""One run at a time writes under one name in one folder: a lock file that names its owner."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from library.core.errors import ConfigError
from library.core.file_owners import Process, this_process
from library.core.options import Config
from library.training.checkpoint import CheckpointNames
from library.training.option_groups import SavingOptions

logger = logging.getLogger(__name__)


def lock_path(saving: SavingOptions) -> Path:
    return Path(saving.output_dir or "") / f".{CheckpointNames(saving.output_name).last()}.lock"


@contextmanager
def claimed_output(config: Config) -> Iterator[None]:
    """Inside, no other run of this project writes under this run's name. ConfigError that names the run that does.

    The system's lock on the file ends with its process, however that ends; where a file system has no locks, the owner
    that the file names is looked for.
    """
    path = lock_path(config[SavingOptions])
    new = [folder for folder in path.parents if not folder.exists()]
    file = _open_locked(path)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)  # while the lock is held, so that nobody's lock is removed
            _open_locks.discard(file)
            file.close()
            with suppress(OSError):
                if os.name == "nt":  # which removes no open file
                    path.unlink(missing_ok=True)
        with suppress(OSError):
            for folder in new:  # a run that was refused leaves no folder; one that holds a file stays
                folder.rmdir()


def _open_locked(path: Path) -> Any:
    own = this_process()
    for _ in range(10):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
        except OSError:
            return None  # the check of --output_dir tells
        owner, is_locked = _owner(file), _lock(file)
        if is_locked is False or (is_locked is None and owner not in (None, own) and owner.is_alive):
            file.close()
            if owner == own:  # two runs of one program, as in a notebook
                return None
            raise ConfigError(_held_by(path, owner))
        if _is_at(path, file):
            break
        file.close()  # its owner removed it while we opened it
    if owner not in (None, own):
        logger.info("taking over the name from a run that ended without a word (%s)", _told(owner))
    file.seek(0)
    file.truncate()
    json.dump({"host": own.host, "pid": own.pid, "started": own.started}, file)
    file.flush()
    _open_locks.add(file)
    return file


def _held_by(path: Path, owner: Process | None) -> str:
    told = _told(owner) if owner is not None else "its number is not known"
    return f"another run writes under this name now ({told}; {path}); wait until it ends, end it, or choose another --output_name or --output_dir"


def _told(owner: Process) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.started))
    return f"process {owner.pid} on {owner.host}, started {started}"


def _owner(file: Any) -> Process | None:
    """Who wrote the lock file, or None when it is empty or something else."""
    try:
        file.seek(0)
        content = json.loads(file.read(10_000))
        return Process(str(content["host"]), int(content["pid"]), int(content["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_at(path: Path, file: Any) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False


def _lock(file: Any) -> bool | None:
    """Take the system's lock: True when it is ours, False when another process has it, None where there are no
    locks."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 20)  # behind the content, which others read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _let_go_in_child() -> None:
    """A loader worker that outlives its run would keep the lock."""
    for file in list(_open_locks):
        with suppress(OSError):
            file.close()
    _open_locks.clear()


_open_locks: set[Any] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
