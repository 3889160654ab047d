"""`metadata_cache.json` of a folder (option cache_info): what a scan found, so that the next one need not open the
files.

{ "<file name>": {"caption": str | null, "resolution": [W, H], "image": stamp, "caption_file": [name, stamp] | null,
"lines": bool | "all", "video": [reader, frames, rate and times in words] | null} }, a stamp being [modification time in
ns, size]. An entry counts while the stamps still agree; entries of the form without stamps (whole paths as keys) are
looked up anew, and folders of frames, whose files may change without them. The file always describes the whole folder.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.core.atomic_file import write_text_atomically
from library.core.errors import ConfigError
from library.core.text_files import read_json
from library.dataset.captions import caption_paths
from library.dataset.clips.video_check import VideoCheck
from library.dataset.clips.video_files import check_of_note, note_of, reader_name
from library.dataset.items import SubsetParams

logger = logging.getLogger(__name__)

FILE_NAME = "metadata_cache.json"


@dataclass(frozen=True)
class KnownImage:
    """A cached entry that is still true. `caption` is that of the caption file, None without one."""

    size: tuple[int, int]
    caption: str | None
    video: VideoCheck | None = None


def stamp(path: str) -> list[int] | None:
    """[modification time in ns, size] of a file, None when there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_mtime_ns, status.st_size]


def caption_source(image_path: str, params: SubsetParams) -> list[Any] | None:
    """[name, stamp] of the caption file that an image uses now."""
    for path in caption_paths(image_path, params):
        found = stamp(path)
        if found is not None:
            return [os.path.basename(path), found]
    return None


def read_info(folder: str) -> dict[str, Any]:
    """The entries of a folder's cache; empty when there is none or it cannot be read."""
    path = os.path.join(folder, FILE_NAME)
    if not os.path.lexists(path):
        return {}
    try:
        return read_json(path, needed=dict)
    except ConfigError as error:
        logger.warning("%s; it is made anew", error)
        return {}


def known_image(entries: Mapping[str, Any], image_path: str, params: SubsetParams) -> KnownImage | None:
    """The entry of an image if image and caption file are unchanged."""
    entry = entries.get(os.path.basename(image_path))
    if not isinstance(entry, dict) or entry.get("image") is None or entry["image"] != stamp(image_path):
        return None
    if entry.get("lines") != _lines(params) or entry.get("caption_file") != caption_source(image_path, params):
        return None
    size, caption = entry.get("resolution"), entry.get("caption")
    is_size = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not (is_size and isinstance(caption, (str, type(None)))):
        return None
    video = None if params.clips is None else _known_video(entry.get("video"))
    return KnownImage((size[0], size[1]), caption, video) if params.clips is None or video is not None else None


def _known_video(noted: Any) -> VideoCheck | None:
    """None for what was seen by another reader, or is damaged."""
    if not (isinstance(noted, list) and len(noted) == 2 and noted[0] == reader_name()):
        return None
    try:
        return check_of_note(str(noted[1]))
    except ValueError:
        return None


def info_entry(
    image_path: str, size: tuple[int, int], caption: str | None, params: SubsetParams, video: VideoCheck | None = None
) -> dict[str, Any]:
    """The entry of an image or video that was just looked at."""
    is_noted = video is not None and os.path.isfile(image_path)
    return {
        "caption": caption, "resolution": list(size), "image": stamp(image_path),
        "caption_file": caption_source(image_path, params), "lines": _lines(params),
        **({"video": [reader_name(), note_of(video)]} if is_noted else {}),
    }


def _lines(params: SubsetParams) -> bool | str:
    """Which lines of its file a caption has: the first, those that are not blank, or the whole text; or that it may be
    JSON."""
    if params.reads_json:
        return f"json, {params.enable_wildcard}"
    return "all" if params.whole_captions and not params.enable_wildcard else params.enable_wildcard


def write_info(folder: str, entries: Mapping[str, Any]) -> str | None:
    """Write the cache of a folder, replacing the old one in one go. Returns a warning when the folder cannot be
    written."""
    path = os.path.join(folder, FILE_NAME)
    try:
        write_text_atomically(path, json.dumps(entries, ensure_ascii=False, indent=2))
    except OSError as error:
        return f"{path} cannot be written ({error.strerror}); the folder is scanned anew each time"
    return None
