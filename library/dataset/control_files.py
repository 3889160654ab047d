"""Which files of a folder belong to which picture or video, by their names: control files and layers. Pure functions of
names; what does not fit is a ConfigError that tells all of it."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Sequence

from library.core.errors import ConfigError, listed
from library.core.file_limits import stem_of

PLAIN = -1
"""number of a file without one: it comes first"""


def control_pictures(
    pictures: Sequence[str], files: Sequence[str], count: int | None
) -> dict[str, tuple[str, ...]]:
    """Of each picture its control files, `count` of them (None: all there are): the one of its name, then those with a
    number behind it.

    A file belongs to the picture with the longest name in front of its own that "." or "_" follows. Further ones are
    passed over.
    """
    owned, problems = _by_owner(map(stem_of, pictures), files)
    found = {picture: owned.get(stem_of(picture), ()) for picture in pictures}
    lacking = [picture for picture, controls in found.items() if len(controls) < (count or 1)]
    if lacking:
        number = f"{count} control pictures each" if count and count > 1 else "a control picture"
        told = [f"{picture} ({len(found[picture])} there)" if found[picture] else picture for picture in lacking]
        problems.append(f"{len(lacking)} pictures lack {number}: {listed(told)}")
    if problems:
        raise ConfigError(problems)
    return {picture: controls[:count] for picture, controls in found.items()}


def layers(pictures: Sequence[str], captioned: Container[str]) -> dict[str, tuple[str, ...]]:
    """Of each picture with a caption the layers: pictures of its name with a number behind it, in order. `captioned`:
    names without extension; all have equally many layers, one at least."""
    bases = {stem_of(picture): picture for picture in pictures if stem_of(picture) in captioned}
    others = [picture for picture in pictures if stem_of(picture) not in captioned]
    owned, problems = _by_owner(bases, others)
    counts = {picture: len(owned.get(stem, ())) for stem, picture in bases.items()}
    if len(set(counts.values())) > 1:
        told = [f"{picture} has {count}" for picture, count in counts.items()]
        problems.append(f"multiple_target needs equally many layers of each picture: {listed(told)}")
    elif not any(counts.values()) and not problems:
        problems.append(
            "multiple_target needs the layers of each picture, as a_0.png, a_1.png, ... of a.png: "
            f"{listed(list(counts))}"
        )
    if problems:
        raise ConfigError(problems)
    return {picture: owned[stem] for stem, picture in bases.items()}


def _by_owner(stems: Iterable[str], files: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """stem -> its files in order, and what is wrong with names."""
    known = set(stems)
    numbered: dict[str, list[tuple[int, str]]] = {}
    wrong: list[str] = []
    for name in sorted(files):
        owner = _owner(name, known)
        if owner is None:
            continue
        number = _number(stem_of(name), owner)
        if number is None:
            wrong.append(name)
        else:
            numbered.setdefault(owner, []).append((number, name))
    problems = [f"{len(wrong)} names have no number behind the name of their picture, as a_0.png has: {listed(wrong)}"]
    return {stem: tuple(name for _, name in sorted(found)) for stem, found in numbered.items()}, problems[: len(wrong)]


def _owner(name: str, stems: Container[str]) -> str | None:
    """The longest of the stems in front of the name that "." or "_" follows."""
    for place in range(len(name) - 1, 0, -1):
        if name[place] in "._" and name[:place] in stems:
            return name[:place]
    return None


def _number(stem: str, owner: str) -> int | None:
    """What stands behind the last "_": 3 of `a_3` and of `a_pose_3`."""
    rest = stem[len(owner) :]
    if not rest:
        return PLAIN
    _, mark, number = rest.rpartition("_")
    return int(number) if mark and number.isdecimal() else None


def control_videos(
    videos: Sequence[str], files: Container[str], folders: Container[str], extensions: Sequence[str]
) -> dict[str, str]:
    """Of each video its control: the file (or folder of frames) of the same name, else the folder of its name without
    extension, else the file with another extension, the first of `extensions` counting first."""

    def control_of(video: str) -> str | None:
        candidates = _candidates(video, folders, extensions)
        return next((name for name in candidates if name in files or name in folders), None)

    found = {video: control_of(video) for video in videos}
    lacking = [video for video, control in found.items() if control is None]
    if lacking:
        raise ConfigError(f"{len(lacking)} videos lack a control video or folder of frames: {listed(lacking)}")
    return {video: control for video, control in found.items() if control is not None}


def _candidates(video: str, folders: Container[str], extensions: Sequence[str]) -> Iterable[str]:
    yield video
    stem = os.path.splitext(video)[0]
    if stem in folders:
        yield stem
    for extension in extensions:
        yield from (stem + extension, stem + extension.upper())
