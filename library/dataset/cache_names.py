"""Names of cache files: of a picture `<name>_<WWWW>x<HHHH><ending>`, of a clip
`<name>_<start>-<frames>_<WWWW>x<HHHH><ending>` with its section behind the frames where it has one, of a caption
`<name><ending>`.

`name` is that of the file without its extension, the size is that of the file, and the endings are those of the
family's record. The functions of cache_io.py add size and ending; here is what stands before them, and the way back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from library.core.file_limits import stem_of
from library.dataset.items import ImageItem

_SIZE = r"_(?P<width>\d+)x(?P<height>\d+)"
_WINDOW = r"_(?P<start>\d{5,})-(?P<frames>\d{3,})(?:-(?P<section>\d{4,}))?"


@dataclass(frozen=True)
class CacheName:
    """What the name of a cache of latents says."""

    stem: str
    original_size: tuple[int, int]
    """(width, height) of the file"""
    window: tuple[int, ...] = ()
    """(start, frames) of a clip, with its section behind them where it has one; () of a picture"""


def window_suffix(window: Sequence[int]) -> str:
    """`_00120-081` of a clip of 81 frames from frame 120 on, `_00120-081-0003` of its section 3, nothing of a
    picture."""
    widths = (5, 3, 4)
    return "_" * bool(window) + "-".join(f"{number:0{width}d}" for number, width in zip(window, widths))


def cache_base(path: str, window: Sequence[int] = (), folder: str | None = None) -> str:
    """The file in whose place a cache stands: `path`, in `folder` where caches have one, with the clip in its name.
    Size and ending take the place of its extension."""
    if folder is not None:
        path = os.path.join(os.path.abspath(folder), os.path.basename(path))
    if not window:
        return path
    stem = stem_of(path)
    return f"{stem}{window_suffix(window)}{path[len(stem) :]}"


def latents_base(item: ImageItem, path: str | None = None) -> str:
    """That of an item's latents. `path` stands for the item's own."""
    return cache_base(path or item.absolute_path, item.window_key, item.subset.cache_directory)


def text_base(item: ImageItem, path: str | None = None) -> str:
    """That of its caption, which all clips of a video share."""
    return cache_base(path or item.absolute_path, (), item.subset.cache_directory)


def parse_latents_name(name: str, ending: str, *, is_clip: bool) -> CacheName | None:
    """What the name of a cache of latents says, without its folder; None where it is none with this ending, or none of
    a clip."""
    found = re.fullmatch(f"(?P<stem>.+){_WINDOW if is_clip else ''}{_SIZE}{re.escape(ending)}", name, re.DOTALL)
    if found is None:
        return None
    numbers = {part: int(number) for part, number in found.groupdict().items() if part != "stem" and number is not None}
    window = tuple(numbers[part] for part in ("start", "frames", "section") if part in numbers)
    return CacheName(found["stem"], (numbers["width"], numbers["height"]), window)
