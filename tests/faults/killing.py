"""Kills a process before its n-th change to a folder: each rename, removal, new folder and file opened for writing
counts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

KILLED, DONE, FAILED = 9, 0, 3
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def killed_before(number: int, folder: Path, action: Callable[[], object]) -> bool:
    """Call `action` in a forked process that dies before change number `number` (from 0) to `folder`; whether it came
    so far.

    A process that dies keeps what the system has, as with kill -9: nothing of it is cleaned up.
    """
    pid = os.fork()
    if pid == 0:
        count = [0]

        def watch(event: str, arguments: tuple) -> None:
            if event == "open":
                path, mode, flags = arguments
                is_change = bool(flags & WRITING) if mode is None else any(letter in mode for letter in "wxa+")
            else:
                path, is_change = arguments[0] if arguments else "", event in CHANGES
            if not is_change or not isinstance(path, (str, bytes, os.PathLike)):
                return
            name = os.fsdecode(path)  # a bare name is one of a folder that is open, as when trees are removed
            if os.sep in name and not name.startswith(str(folder)):
                return
            if count[0] == number:
                os._exit(KILLED)
            count[0] += 1

        sys.addaudithook(watch)
        try:
            action()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(FAILED)
        os._exit(DONE)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (KILLED, DONE), "the action failed in the forked process"
    return code == KILLED
