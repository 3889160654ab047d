"""Files appear complete or not at all: written under a temporary name in the same folder, flushed, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from library.console import storable
from library.file_limits import cut_name

_LONGEST_SUFFIX = 20
"""what stands behind the last dot of a longer name is no format"""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is fsynced and takes the name, else it is removed.

    The folder is made when it is missing. The temporary name keeps the suffix, because writers choose a format by it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    suffix = target.suffix if len(target.suffix) <= _LONGEST_SUFFIX else ""
    handle, temporary = tempfile.mkstemp(prefix=f".{cut_name(target.stem, 60)}-", suffix=suffix, dir=target.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, FILE_MODE)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file."""
    with atomic_path(path) as temporary:
        temporary.write_text(storable(text), encoding="utf-8", newline="\n")


def _umask() -> int:
    """The process's file mode mask; there is no call that reads it without setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


FILE_MODE = 0o666 & ~_umask()
"""of new files; read once at import, because reading it later would change the mode of files that other threads make"""
