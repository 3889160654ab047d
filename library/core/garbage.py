"""Python's garbage collector where it would look through what stays.

Importing torch and transformers makes some 400,000 objects that stay, through which it would look a thousand times:
a quarter of the time of a start. So a program waits with it until everything is imported and checked, and leaves out
what exists by then. Only programs of their own do: in a notebook, what exists may be an earlier run.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_is_waiting = False
_is_own_program = False


def wait_until_started() -> None:
    """Collect nothing before `started`. Call it first in a program of its own."""
    global _is_waiting, _is_own_program
    _is_own_program = True
    _is_waiting = gc.isenabled()
    gc.disable()


def in_own_program() -> bool:
    """Whether this process is a program of its own (`wait_until_started`), and no notebook that does other things too."""
    return _is_own_program


def started() -> None:
    """After imports and checks, before models: collect from now on, among new objects. Does nothing without
    `wait_until_started`."""
    global _is_waiting
    if _is_waiting:
        _is_waiting = False
        gc.freeze()
        gc.enable()


@contextmanager
def records_stay() -> Iterator[None]:
    """For work that makes many small records, all of which stay: Python would look through them for cycles again and
    again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
