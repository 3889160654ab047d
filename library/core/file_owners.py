"""Names of files that a process makes for a while, by which the next run knows whether their owner still lives."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import shutil
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from library.core.file_limits import cut_name

logger = logging.getLogger(__name__)

_STEM_BYTES, _SUFFIX_BYTES = (
    60,
    20,
)  # what is left of a file's own name in that of its temporary; a longer suffix is no format
_SAME_START_S = 120  # clocks are set; a process that took the number of a dead one started later than that
_OWNED = re.compile(r"\.(?:.*\.)?([0-9a-f]{8})-(\d+)-(\d+)-\d+\.(tmp|old|gone)(?:\.[^.]*)?")
_numbers = itertools.count()


@dataclass(frozen=True)
class Process:
    """A process of some machine: name of the machine, number, start in seconds since 1970."""

    host: str
    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        """Whether it runs on this machine; unknown ones of other machines count as alive."""
        if self.host != host_name():
            return True
        import psutil

        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) <= _SAME_START_S
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True


def this_process() -> Process:
    return _process(os.getpid())


@lru_cache(maxsize=8)  # a forked process has another number
def _process(pid: int) -> Process:
    import psutil

    return Process(host_name(), pid, int(psutil.Process(pid).create_time()))


def host_name() -> str:
    return socket.gethostname()


def _host_mark(host: str) -> str:
    return hashlib.sha256(host.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def owned_name(path: Path, ending: str) -> Path:
    """A hidden name beside `path` that no other file has and that tells its owner: `ending` is "tmp" for what is being
    written, "old" for a folder in which stands what is being replaced, "gone" for what is being removed. The suffix
    stays, because writers choose a format by it."""
    owner = this_process()
    mark = f"{_host_mark(owner.host)}-{owner.pid}-{owner.started}-{next(_numbers)}"
    stem = cut_name(path.stem, _STEM_BYTES)
    suffix = path.suffix if 0 < len(os.fsencode(path.suffix)) <= _SUFFIX_BYTES else ""
    return path.with_name(f".{stem}.{mark}.{ending}{suffix}")


def is_owned(name: str) -> bool:
    """Whether `owned_name` made this name."""
    return _OWNED.fullmatch(name) is not None


def clean_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what dead processes of this machine left half written in a folder, and put back what they had taken away
    to replace it but did not replace. Returns what was removed or put back."""
    handled = []
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith("."))
    except OSError:
        return []
    for name in names:
        match = _OWNED.fullmatch(name)
        if (
            match is None
            or match[1] != _host_mark(host_name())
            or Process(host_name(), int(match[2]), int(match[3])).is_alive
        ):
            continue
        path = Path(folder) / name
        try:
            handled += _put_back(path) if match[4] == "old" else []
            _remove(path)
            handled.append(path)
        except OSError as error:
            logger.warning("%s, which a run that ended left behind, cannot be removed (%s)", path, error.strerror)
    if handled:
        logger.info(
            "removed what a run that was killed left half written: %s", ", ".join(str(path) for path in handled)
        )
    return handled


def _put_back(aside: Path) -> list[Path]:
    """The folder that was moved into `aside`, under its name again, where nothing stands in its place."""
    back = [aside.with_name(name) for name in os.listdir(aside) if not os.path.lexists(aside.with_name(name))]
    for path in back:
        os.replace(aside / path.name, path)
    return back


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
