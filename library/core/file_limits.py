"""How long a file name may be, and names that keep to it."""

from __future__ import annotations

import functools
import hashlib
import os
import sys

_USUAL = 255
"""of nearly all file systems, where the system does not tell"""
_ALWAYS = 143
"""no file system in use takes less (encrypted home folders)"""
_HASH_DIGITS = 20


def name_limit(folder: str | os.PathLike[str]) -> int:
    """The longest name of a file in a folder, which need not exist yet; see `name_length`."""
    place = os.path.abspath(folder)
    while not os.path.isdir(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    return _limit_of(place)


@functools.lru_cache(maxsize=1024)
def _limit_of(folder: str) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has no such call, some network drives no answer
        return _USUAL


def name_length(name: str) -> int:
    """The length of a name as file systems count it: bytes, or on Windows the two-byte units of UTF-16."""
    if sys.platform == "win32":
        return len(name.encode("utf-16-le", "surrogatepass")) // 2
    return len(os.fsencode(name))


def cut_name(name: str, length: int) -> str:
    """The longest beginning of a name that is at most `length` long."""
    while name_length(name) > length:
        name = name[: -max(1, (name_length(name) - length) // 4)]
    return name


def stem_of(path: str) -> str:
    """`os.path.splitext(path)[0]`, at a fraction of its time where folder and name are plain."""
    stem, _, extension = path.rpartition(".")
    if not stem or stem[-1] in "/\\." or "/" in extension or "\\" in extension:
        return os.path.splitext(path)[0]
    return stem


def path_within_limit(stem: str, ending: str) -> str:
    """The path `stem + ending`, or where its name would be too long, one with the beginning of the stem and a hash of
    it.

    The hash is of the stem's name alone, so that a folder can be moved.
    """
    if len(stem) + len(ending) <= _ALWAYS and stem.isascii() and ending.isascii():
        return stem + ending  # the whole path is short enough for a name
    folder, name = os.path.split(stem)
    if len(name) + len(ending) <= _ALWAYS and name.isascii() and ending.isascii():
        return stem + ending
    limit = name_limit(folder or ".")
    if name_length(name + ending) <= limit:
        return stem + ending
    digits = hashlib.sha256(os.fsencode(name)).hexdigest()[:_HASH_DIGITS]
    kept = cut_name(name, max(0, limit - name_length(ending) - _HASH_DIGITS - 1))
    return os.path.join(folder, f"{kept}~{digits}{ending}")
