"""Files and folders appear complete or not at all: written under a temporary name beside the target, flushed, then
renamed.

What another program holds open (as Windows forbids to replace it) is tried again for some seconds; then what was
written is kept under another name, and what was to be removed stays, with a warning.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from library.core.console import storable
from library.core.file_owners import owned_name
from library.core.postponed_writes import postponing
from library.core.write_errors import HeldFileError, WriteError, os_error_of, write_error, write_errors_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

HELD_SECONDS = 5.0
"""how long a file that another program holds open is tried again"""
_HELD_ON_WINDOWS = (32, 33, 1224)  # sharing violation, lock violation, mapped file
_NOT_FLUSHABLE = {errno.EINVAL, getattr(errno, "ENOTSUP", errno.EINVAL)}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is flushed and takes the name, else it is
    removed.

    The folder is made when it is missing. WriteError for a full disk and the like; HeldFileError when another program
    holds the target, and then the file is kept under another name. Nothing inside is postponed (postponed_writes).
    """
    target = Path(path)
    with write_errors_of(target), postponing(None):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = owned_name(target, "tmp")
        open(temporary, "xb").close()
        try:
            yield temporary
            _flush(temporary)
            with suppress(OSError):  # some network drives know no modes
                os.chmod(temporary, FILE_MODE)
            _take_name(temporary, target)
        except HeldFileError:
            raise
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def scratch_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that is removed in any case. Nothing inside is postponed."""
    temporary = owned_name(Path(path), "tmp")
    with write_errors_of(path), postponing(None):
        try:
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As atomic_path for a folder: an earlier one of the name stands until the new one is complete, then goes."""
    target = Path(path)
    with write_errors_of(target), postponing(None):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = owned_name(target.with_name(target.name.replace(".", "_")), "tmp")
        temporary.mkdir()
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    _flush(file)
            _replace_folder(temporary, target)
        except HeldFileError:
            raise
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, WriteError):  # of a file inside, under a name that nobody knows
                raise write_error(target, os_error_of(error) or OSError(errno.EIO, "")) from error
            raise


def unwritable(folder: str | os.PathLike[str]) -> str | None:
    """Why no file could be written below a folder that is there or would be made; None when one could. Nothing is
    made."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror or str(error)


def unwritable_problem(option: str, folder: str) -> str | None:
    """`unwritable` of the folder that an option names, in words."""
    reason = unwritable(folder)
    return f"--{option} is {folder}; files cannot be written there ({reason})" if reason else None


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file."""
    with atomic_path(path) as temporary:
        temporary.write_text(storable(text), encoding="utf-8", newline="\n")


def remove_file(path: str | os.PathLike[str]) -> bool:
    """Remove a file; when another program holds it, it stays with a warning. Whether it is gone."""
    return _removed(path, lambda: os.remove(path))


def remove_folder(path: str | os.PathLike[str]) -> bool:
    """Remove a folder: renamed first, so that it is never seen half empty under its name. When another program holds a
    file in it, all of it stays with a warning. Whether it is gone."""
    aside = owned_name(Path(path), "gone")
    return _removed(path, lambda: os.replace(path, aside)) and _removed(aside, lambda: shutil.rmtree(aside))


def move(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rename, tried again while another program holds one of them."""
    _while_held(lambda: os.replace(source, target))


def _removed(path: str | os.PathLike[str], remove: Callable[[], None]) -> bool:
    try:
        _while_held(remove)
    except FileNotFoundError:
        return True
    except OSError as error:
        logger.warning("%s cannot be removed (%s); it stays", path, error.strerror or error)
        return not os.path.lexists(path)
    return True


def _replace_folder(temporary: Path, target: Path) -> None:
    aside = owned_name(target.with_name(target.name.replace(".", "_")), "old")
    try:
        if os.path.lexists(target):
            aside.mkdir()
            _while_held(lambda: os.replace(target, aside / target.name))  # its whole name lets the next run put it back
        _while_held(lambda: os.replace(temporary, target))
    except OSError as error:
        if os.path.isdir(aside):
            with suppress(OSError):
                os.replace(aside / target.name, target)
            shutil.rmtree(aside, ignore_errors=True)
        raise _kept(temporary, target, error) if _is_held(error) else error
    _flush_folder(target.parent)
    if os.path.isdir(aside):
        _removed(aside, lambda: shutil.rmtree(aside))


def _take_name(temporary: Path, target: Path) -> None:
    try:
        _while_held(lambda: os.replace(temporary, target))
    except OSError as error:
        raise _kept(temporary, target, error) if _is_held(error) else error


def _kept(temporary: Path, target: Path, error: OSError) -> HeldFileError:
    """Give what was written a name that stays, and say which."""
    is_folder = temporary.is_dir()
    stem, suffix = (target.name, "") if is_folder else (target.stem, target.suffix)
    kept = next(
        path for n in range(1, 10_000) if not os.path.lexists(path := target.with_name(f"{stem}-new{n}{suffix}"))
    )
    try:
        os.replace(temporary, kept)
    except OSError:
        try:
            (shutil.copytree if is_folder else shutil.copyfile)(temporary, kept)
        except OSError:
            kept = temporary
    return HeldFileError(
        f"{target} cannot be replaced ({error.strerror or error}): another program holds it open, or there is no "
        "permission; what was"
        f" written is {kept}. Close that program and rename it",
        kept, target,
    )  # fmt: skip


def _while_held(action: Callable[[], T]) -> T:
    deadline, pause = time.monotonic() + HELD_SECONDS, 0.05
    while True:
        try:
            return action()
        except OSError as error:
            if not _is_held(error) or time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _is_held(error: OSError) -> bool:
    return isinstance(error, PermissionError) or getattr(error, "winerror", None) in _HELD_ON_WINDOWS


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _NOT_FLUSHABLE:
                raise


def _flush_folder(folder: Path) -> None:
    """Let the disk know the new name before an old one goes; where folders can be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    """The process's file mode mask; there is no call that reads it without setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


FILE_MODE = 0o666 & ~_umask()
"""of new files; read once at import, because reading it later would change the mode of files that other threads make"""
