"""Videos as the data side sees them, files and folders of frames: what is known of one before it is used, and its
frames one by one. PyAV reads files where it is installed, else OpenCV."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from library.dataset.cache_index import CacheIndex
from library.dataset.clips import frame_folders, opencv_video, pyav_video
from library.dataset.clips.video_check import VideoCheck
from library.dataset.media_utils import ImageFileError

VIDEO_EXTENSIONS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")
"""of video files, in lower case, in the order in which control videos of one name are preferred"""
FAR = 100
"""frames before a clip that are decoded rather than that a reader looks for a place to begin"""
PYAV = (14, 1)
"""the lowest version that is used"""
QUESTION = "what the frames of a video tell"
FLAGS = ("deep", "transparent", "invisible", "reads_alpha", "mixed_sizes")


class VideoReader(Protocol):
    """A module that reads one kind of video."""

    def look(self, path: str) -> VideoCheck: ...

    def each_frame(self, path: str, with_alpha: bool) -> Iterator[Callable[[], np.ndarray]]: ...


class FileReader(VideoReader, Protocol):
    """One that reads files, and can begin in the middle of those with even times."""

    def frames_near(
        self, path: str, first: int, rate: Fraction, with_alpha: bool
    ) -> Iterator[tuple[int, Callable[[], np.ndarray]]]: ...


def reader_of(path: str) -> VideoReader:
    return frame_folders if os.path.isdir(path) or frame_folders.is_picture(path) else file_reader()


def file_reader() -> FileReader:
    return pyav_video if has_pyav() else opencv_video


def verify_video(path: str) -> VideoCheck:
    """`look_at_video`, with all frames decoded. ImageFileError for one that cannot be."""
    check = look_at_video(path)
    for _ in frames_of(path, range(check.frames)):
        pass
    return check


def reader_name() -> str:
    """What reads files here."""
    return "PyAV" if has_pyav() else "OpenCV"


@functools.lru_cache
def has_pyav() -> bool:
    """Whether PyAV is there, in a version that tells of rotations."""
    try:
        found = importlib.metadata.version("av").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in found[:2] if part.isdecimal()) >= PYAV


def look_at_video(path: str) -> VideoCheck:
    """Size, frames and times of a video. Raises ImageFileError, which names the file, for what cannot be used."""
    return reader_of(path).look(path)


def look_at_noted_video(path: str, index: CacheIndex) -> VideoCheck:
    """`look_at_video`, of which an index may know the result from an earlier start: then the file is not opened. A
    folder of frames, whose files may change without it, is always looked at."""
    if os.path.isdir(path):
        return look_at_video(path)

    def look() -> tuple[str, str]:
        return note_of(look_at_video(path)), ""

    return check_of_note(index.find(path, f"{QUESTION}, read by {reader_name()}", look)[0])


def note_of(check: VideoCheck) -> str:
    """A check as words in one line."""
    flags = (int(getattr(check, name)) for name in FLAGS)
    times = ",".join(map(str, check.times)) or "-"
    return " ".join(map(str, (*check.size, check.frames, check.promised, check.rate or 0, times, *flags)))


def check_of_note(text: str) -> VideoCheck:
    """ValueError for what is none."""
    width, height, frames, promised, rate, times, *flags = text.split(" ")
    begins = () if times == "-" else tuple(map(Fraction, times.split(",")))
    return VideoCheck(
        (int(width), int(height)), frames=int(frames), promised=int(promised), rate=Fraction(rate) or None,
        times=begins, **{name: flag == "1" for name, flag in zip(FLAGS, flags)},
    )


def frames_of(
    path: str, numbers: Sequence[int], *, rate: Fraction | None = None, with_alpha: bool = False
) -> Iterator[np.ndarray]:
    """The frames of these numbers, which may repeat and never fall, [H, W, 3 or 4] uint8 as shown; one at a time is in
    memory. `rate`: frames per second of the file, where they are even: then those far behind are found without decoding
    all before them. Raises ImageFileError where one is not there."""
    wanted = iter(numbers)
    next_number = next(wanted, None)
    for number, read in _numbered(path, next_number or 0, rate, with_alpha):
        frame = None
        while number == next_number:
            frame = read() if frame is None else frame
            yield frame
            next_number = next(wanted, None)
        if next_number is None:
            return
    if next_number is not None:
        raise ImageFileError(f"{path} has no frame {next_number}, or it cannot be decoded; the file is damaged")


def _numbered(
    path: str, first: int, rate: Fraction | None, with_alpha: bool
) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Frames with their numbers, from one that is not behind `first` on."""
    if rate is not None and first >= FAR:
        near = file_reader().frames_near(path, first, rate, with_alpha)
        begin = next(near, None)
        if begin is not None and begin[0] <= first:
            yield begin
            yield from near
            return
    yield from enumerate(reader_of(path).each_frame(path, with_alpha))
