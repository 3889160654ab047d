"""`.atelier_index.json` of a folder with cache files: which of them were found right, so that the next start need not read them.

{"version": 1, "files": {"<file name>": [size, modification time ns, change time ns, question, second, answer, ...]}}, with as many
answers as there are questions. A question is the hash of everything that decides whether a file may be used: what it should hold, made by
which model, and the stamps of the files it was made from. So another picture, caption, model or setting asks another question,
and a changed cache file has another stamp; either is looked at as if there were no index.

An answer counts only while all files of its question are older than the second in which it was found: a file may change twice
within the resolution of a file system's clock. Only good answers are kept. A folder that cannot be written keeps its index in
memory for the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from library.atomic_file import write_text_atomically

logger = logging.getLogger(__name__)

FILE_NAME = ".atelier_index.json"
VERSION = 1
"""to be raised when the rules by which a cache file is judged change: answers of older rules are then not believed"""

Stamp = list[int]
NUM_STAMP = 3
Found = tuple[str | None, str]
"""(answer, "") of a file that may be used, or (None, why not)"""


def stamp_of(path: str) -> Stamp | None:
    """[size, modification time, change time in ns] of a file; None when there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class CacheIndex:
    """The indexes of all folders that a phase of a run looks into. Threads may ask at the same time."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, Any]] = {}
        self._changed: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def find(self, path: str, question: str, read: Callable[[], Found], sources: Sequence[str] = ()) -> Found:
        """The answer to a question about a cache file: the noted one, or what `read` finds, which is then noted.

        `question` says all that the answer depends on beside the content of `path` and `sources`.
        """
        second, stamps = int(time.time()), [stamp_of(name) for name in (path, *sources)]
        if None in stamps:
            return read()
        key = hashlib.blake2b(f"{question} {stamps[1:]}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        folder, name = os.path.split(path)
        noted = self._noted(folder, name, key, stamps)
        if noted is not None:
            return noted, ""
        answer, reason = read()
        if answer is not None:
            self._note(folder, name, key, stamps[0], second, answer)
        return answer, reason

    def save(self) -> None:
        """Write what is new, beside what other processes have written meanwhile. A folder that cannot be written is left alone."""
        for folder, names in self._changed.items():
            entries = self._entries(folder)
            present = _names_in(folder)
            merged = {name: entry for name, entry in _read(folder).items() if name in present}
            merged |= {name: entries[name] for name in names if name in present}
            text = json.dumps({"version": VERSION, "files": merged}, separators=(",", ":"))
            try:
                write_text_atomically(os.path.join(folder, FILE_NAME), text)
            except OSError as error:
                logger.debug("no index of cache files is kept in %s: %s", folder, error)
        self._changed = {}

    def _entries(self, folder: str) -> dict[str, Any]:
        entries = self._folders.get(folder)
        if entries is None:
            with self._lock:
                entries = self._folders.setdefault(folder, _read(folder))
        return entries

    def _noted(self, folder: str, name: str, key: str, stamps: Sequence[Stamp]) -> str | None:
        entry = self._entries(folder).get(name)
        if not isinstance(entry, list) or entry[:NUM_STAMP] != stamps[0] or key not in entry:
            return None
        second, answer = [*entry[entry.index(key) + 1 :], None, None][:2]
        if not isinstance(second, int) or any(mtime // 10**9 >= second for _, mtime, _ in stamps):
            return None
        return answer if isinstance(answer, str) else None

    def _note(self, folder: str, name: str, key: str, stamp: Stamp, second: int, answer: str) -> None:
        entries = self._entries(folder)
        with self._lock:
            entry = entries.get(name)
            is_same = isinstance(entry, list) and entry[:NUM_STAMP] == stamp
            known = entry[NUM_STAMP:] if is_same else []
            if key in known:
                place = known.index(key)
                known = known[:place] + known[place + 3 :]
            entries[name] = [*stamp, *known, key, second, answer]
            self._changed.setdefault(folder, set()).add(name)


def _names_in(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _read(folder: str) -> dict[str, Any]:
    """The entries of a folder's index; none where it is missing, damaged or of other rules."""
    try:
        with open(os.path.join(folder, FILE_NAME), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(content, dict) and content.get("version") == VERSION and isinstance(content.get("files"), dict)
    return content["files"] if is_ours else {}
