"""`.atelier_index.json` of a folder with cache files: which of them were found right, and what the headers of the
pictures beside them tell, so that the next start need not read them.

{"version": 2, "files": {"<file name>": "<size>,<modification time ns>,<change time ns>|<question> <made of> <second>
<answer>|..."}} with as many answers as were asked for; texts, since lists of numbers for tens of thousands of files
take several times as long to read. A question is the hash of all settings that decide whether a file may be used: what
it should hold, made by which model. What it was made of is the stamp of the picture, or the hash of the caption. So
another picture, caption, model or setting finds no answer, and a changed cache file has another stamp; either is looked
at as if there were no index.

An answer counts only while all files of its question are older than the second in which it was found: a file may change
twice within the resolution of a file system's clock. Only good answers are kept. A folder that cannot be written keeps
its index in memory for the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from library.core.atomic_file import write_text_atomically

logger = logging.getLogger(__name__)

FILE_NAME = ".atelier_index.json"
VERSION = 2
"""to be raised when the rules by which a cache file is judged change: answers of older rules are then not believed"""

Stamp = tuple[int, int, int]
Found = tuple[str | None, str]
"""(answer, "") of a file that may be used, or (None, why not)"""


def stamp_of(path: str) -> Stamp | None:
    """(size, modification time, change time in ns) of a file; None when there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class CacheIndex:
    """The indexes of all folders that a run looks into while it fills its caches. Threads may ask at the same time."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, str]] = {}
        self._changed: dict[str, set[str]] = {}
        self._keys: dict[str, str] = {}
        self._stamps: dict[str, Stamp] = {}
        self._lock = threading.Lock()

    def find(
        self, path: str, question: str, read: Callable[[], Found], *, source: str | None = None, detail: str = ""
    ) -> Found:
        """The answer to a question about a cache file: the noted one, or what `read` finds, which is then noted.

        `question` and `detail` say all that the answer depends on beside the content of `path` and `source`: the
        question what is common to many files, the detail (a word) what is not.
        """
        second, stamp = int(time.time()), stamp_of(path)
        other = stamp if source is None else self._stamps.get(source) or stamp_of(source)
        if stamp is None or other is None:
            return read()
        if source is None and not detail:
            self._stamps[path] = stamp  # a picture, the source of its latents: one look serves both
        folder, name = _split(path)
        what = self._keys.get(question) or self._key_of(question)
        made_of = detail if source is None else "%d,%d,%d" % other
        noted = _noted(
            self._entries(folder).get(name),
            "%d,%d,%d|" % stamp,
            f"|{what} {made_of} ",
            max(stamp[1], other[1]) // 10**9,
        )
        if noted is not None:
            return noted, ""
        answer, reason = read()
        if answer is not None:
            earlier = f"{what} {made_of} " if source is None else f"{what} "
            self._note(folder, name, "%d,%d,%d" % stamp, earlier, f"{what} {made_of} {second} {answer}")
        return answer, reason

    def save(self) -> None:
        """Write what is new, beside what other processes have written meanwhile. A folder that cannot be written is
        left alone."""
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

    def release(self) -> None:
        """Forget what was read; what was not saved is lost."""
        self._folders, self._changed, self._stamps = {}, {}, {}

    def _key_of(self, question: str) -> str:
        key = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return self._keys.setdefault(question, key)

    def _entries(self, folder: str) -> dict[str, str]:
        entries = self._folders.get(folder)
        if entries is None:
            absolute = os.path.abspath(folder)  # one index, however the folder is written
            with self._lock:
                if absolute not in self._folders:
                    self._folders[absolute] = _read(absolute)
                entries = self._folders[folder] = self._folders[absolute]
        return entries

    def _note(self, folder: str, name: str, stamp: str, earlier: str, answer: str) -> None:
        """Keep an answer beside those that do not begin with `earlier`: to other questions, or about another
        caption."""
        entries = self._entries(folder)
        with self._lock:
            known = entries.get(name)
            is_same = isinstance(known, str) and known.startswith(f"{stamp}|")
            kept = [other for other in known.split("|")[1:] if not other.startswith(earlier)] if is_same else []
            entries[name] = "|".join([stamp, *kept, answer])
            self._changed.setdefault(folder, set()).add(name)


def _noted(entry: Any, stamp: str, question: str, youngest: int) -> str | None:
    """The answer of an entry, if it is about these very files and all of them were older than the second in which it
    was found."""
    if not isinstance(entry, str) or not entry.startswith(stamp):
        return None
    second, _, answer = entry.partition(question)[2].partition("|")[0].partition(" ")
    return answer if second.isdecimal() and youngest < int(second) else None


def _split(path: str) -> tuple[str, str]:
    """os.path.split, at a fraction of its time where a path is plain."""
    folder, _, name = path.rpartition("/")
    return (folder, name) if folder and name and os.sep == "/" and folder[-1] != "/" else os.path.split(path)


def _names_in(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _read(folder: str) -> dict[str, str]:
    """The entries of a folder's index; none where it is missing, damaged or of other rules."""
    try:
        with open(os.path.join(folder, FILE_NAME), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(content, dict) and content.get("version") == VERSION and isinstance(content.get("files"), dict)
    return content["files"] if is_ours else {}
