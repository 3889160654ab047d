"""JSONL files that list images or videos with captions and control files, one object in a line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.core.errors import ConfigError, listed
from library.core.text_files import parse_json, read_text


@dataclass(frozen=True)
class ListEntry:
    """One line. Paths as they stand there, those with numbers in the order of these."""

    path: str
    caption: str | None = None
    targets: tuple[str, ...] = ()
    """further pictures (image_path_1, image_path_2, ...), which are layers of the first"""
    controls: tuple[str, ...] = ()


def read_list(path: str, medium: str, control_count: int | None = 1) -> list[ListEntry]:
    """The lines of a list of images or videos (`medium` is image or video), in their order. `control_count`: control
    files of each picture, where some have any (None: any number); a video has one; further ones are passed over. 0:
    none are read.

    Raises ConfigError with every faulty line.
    """
    text = read_text(path, f"the list {path}")
    problems: list[str] = []
    entries: list[ListEntry] = []
    places: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            entries.append(_entry(parse_json(line, where), where, medium))
            places.append(where)
        except ConfigError as error:
            problems += error.problems
    if medium == "video":
        control_count = 0 if control_count == 0 else 1
    problems += _control_problems(entries, places, control_count)
    if problems:
        raise ConfigError(problems)
    return [dataclasses.replace(entry, controls=entry.controls[:control_count]) for entry in entries]


def _entry(values: Any, where: str, medium: str) -> ListEntry:
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is not an object with {medium}_path and caption")
    paths, controls = _numbered(values, f"{medium}_path"), _numbered(values, "control_path")
    if not paths:
        other = "image_path" if medium == "video" else "video_path"
        hint = f"; {other} is for a list of {'images' if medium == 'video' else 'videos'}" if other in values else ""
        raise ConfigError(f"{where} has no {medium}_path{hint}")
    caption = values.get("caption")
    for name, value in [*paths.items(), *controls.items()]:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ConfigError(f"{where}: {name} is {value!r}; a path is needed")
    if not isinstance(caption, (str, type(None))):
        raise ConfigError(f"{where}: caption is {caption!r}; a text is needed")
    first, *targets = paths.values()
    return ListEntry(first, caption, tuple(targets), tuple(controls.values()))


def _numbered(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of `name` and of `name_<number>`, by number."""
    found = ((re.fullmatch(rf"{name}(?:_(\d{{1,9}}))?", key), key) for key in values)
    keys = sorted((-1 if match[1] is None else int(match[1]), key) for match, key in found if match)
    return {key: values[key] for _, key in keys}


def _control_problems(entries: list[ListEntry], places: list[str], count: int | None) -> Iterator[str]:
    if count is None or not any(entry.controls for entry in entries):
        return
    lacking = [place for entry, place in zip(entries, places) if len(entry.controls) < count]
    if lacking:
        needed = "control_path" if count == 1 else f"{count} control paths"
        yield f"{len(lacking)} lines have no {needed}, which others have: {listed(lacking)}"
