"""Files that cannot be written: what the system says, in whatever words a library wraps it, as one message for the
user."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from library.core.errors import AtelierError

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_OURS_IN_ANY_CASE = {*_FULL, errno.EROFS, errno.EFBIG}
"""these come from writing alone, so that the file need not be named in the error"""
_REASONS = {
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file is larger than this file system takes (4 GB on FAT32)",
    errno.EACCES: "there is no permission to write there",
    errno.EPERM: "there is no permission to write there",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.ENOENT: "its folder is gone",
    errno.ENODEV: "its disk is gone",
    errno.EIO: "the disk reports an error of reading or writing",
    errno.EMFILE: "this process has too many files open (raise the limit with ulimit -n 4096)",
}
_RUST = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "iostream error")
_NEARLY_FULL = 1 << 20  # bytes


class WriteError(AtelierError, OSError):
    """A file could not be written. The message names it, tells why, what is there now and what to do. It is an OSError
    too, so that code which can do without the file passes over it as before."""

    def __init__(self, message: str, error: OSError | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.errno, self.strerror = (error.errno, error.strerror) if error is not None else (None, None)

    def __str__(self) -> str:
        return self.message

    def with_more(self, text: str) -> WriteError:
        """The same error with more to tell."""
        more = WriteError(f"{self.message}. {text}")
        more.errno, more.strerror = self.errno, self.strerror
        return more


class HeldFileError(WriteError):
    """The `place` of a finished file is held open by another program; `kept` is where the file lies instead."""

    def __init__(self, message: str, kept: Path | None = None, place: Path | None = None) -> None:
        super().__init__(message)
        self.kept, self.place = kept, place


def os_error_of(error: BaseException | None) -> OSError | None:
    """The system's error behind one that a library raised, or None: itself, one that it came from, or a number in its
    text."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, WriteError):
            return error
        number = _RUST.search(str(error)) if not isinstance(error, OSError) else None
        if number:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


@contextmanager
def write_errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, what keeps `path` from being written becomes a WriteError; all other errors pass."""
    try:
        yield
    except AtelierError:
        raise
    except Exception as error:
        cause = _cause(error, Path(path))
        if cause is None:
            raise
        raise write_error(path, cause) from error


def _cause(error: Exception, path: Path) -> OSError | None:
    found = os_error_of(error)
    if found is None:
        text = str(error)
        if isinstance(error, RuntimeError) and any(mark in text for mark in _TORCH_WRITER):  # torch keeps no number
            full = _free_bytes(path.parent) < _NEARLY_FULL
            return OSError(errno.ENOSPC if full else errno.EIO, "")
        return None
    if isinstance(found, (ConnectionError, TimeoutError)):
        return None
    if found.errno in _OURS_IN_ANY_CASE:
        return found
    names = [name for name in (found.filename, found.filename2) if isinstance(name, (str, os.PathLike))]
    is_ours = not names or any(Path(name) == path or path.parent in Path(name).parents for name in names)
    return found if is_ours else None


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return _NEARLY_FULL


def write_error(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """The message for an error of the system while `path` was written."""
    path = Path(path)
    if error.errno in _FULL:
        reason, advice = "no space is left on the disk", f"Make room in {path.parent} and run the command again"
    else:
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        advice = "Mend this, or choose another place, and run the command again"
    present = (
        "; the earlier one of this name is unchanged" if os.path.lexists(path) else "; nothing of it is left there"
    )
    return WriteError(f"{path} could not be written: {reason}{present}. {advice}", error)


def disk_problem(error: BaseException) -> str | None:
    """One line for an error of a full or read-only disk that came from anywhere else, or None."""
    found = os_error_of(error)
    if found is None or found.errno not in {*_OURS_IN_ANY_CASE, errno.EMFILE, errno.ENFILE}:
        return None
    where = f"{found.filename}: " if found.filename else ""
    reason = (
        "no space is left on the disk" if found.errno in _FULL else _REASONS.get(found.errno, os.strerror(found.errno))
    )
    return f"{where}{reason}; files that were finished before are whole"
