"""Videos read by OpenCV. What it tells of the number of frames is not always true, so that they are counted one by one;
transparency is not read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from library.dataset.clips.rates import stored_rate
from library.dataset.clips.video_check import VideoCheck, check_is_file, no_frames, number_at, timed_check
from library.dataset.media_utils import ImageFileError

if TYPE_CHECKING:
    import cv2

FFMPEG_LEVEL = ("OPENCV_FFMPEG_LOGLEVEL", "-8")
"""silence: what cannot be read is told once, by us"""
COUNTED = (".mp4", ".m4v", ".mov", ".avi")
"""containers that hold the number of frames; of others it is guessed from a duration, which may be that of the sound"""
ALPHA_FORMATS = (b"RGBA", b"BGRA", b"ARGB", b"ABGR")
ALPHA_BEGINNINGS = (b"Y4", b"G4")
"""how the names of planar pixel formats with alpha begin"""


def look(path: str) -> VideoCheck:
    """Size, frames and times, by going through the file. Raises ImageFileError."""
    import cv2

    with _opened(path) as capture:
        times, size = [], None
        while capture.grab():
            times.append(Fraction(round(capture.get(cv2.CAP_PROP_POS_MSEC) * 1000), 1_000_000))
            if size is None:
                size = _retrieved(capture, path).shape[1::-1]
        if size is None:
            raise no_frames(path)
        is_counted = os.path.splitext(path)[1].lower() in COUNTED
        promised = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0) if is_counted else 0
        check = timed_check(size, times, stored_rate(capture.get(cv2.CAP_PROP_FPS)), promised, _has_alpha(capture))
        return dataclasses.replace(check, reads_alpha=False)


def _has_alpha(capture: cv2.VideoCapture) -> bool:
    import cv2

    name = (int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)) & 0xFFFFFFFF).to_bytes(4, "little")
    return name in ALPHA_FORMATS or name[:2] in ALPHA_BEGINNINGS


def each_frame(path: str, with_alpha: bool) -> Iterator[Callable[[], np.ndarray]]:
    """For every frame, what gives its pixels [H, W, 3 or 4] as shown, to be called before the next frame is asked for;
    frames that nobody asks for are not converted."""
    with _opened(path) as capture:
        while capture.grab():
            yield lambda: _retrieved(capture, path, with_alpha)


def frames_near(
    path: str, first: int, rate: Fraction, with_alpha: bool
) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Frames with their numbers, from `first` or some before it on, of a file with even times; nothing where OpenCV
    does not find the place. Each is read before the next is asked for."""
    import cv2

    with _opened(path) as capture:
        capture.grab()
        begin = capture.get(cv2.CAP_PROP_POS_MSEC)
        capture.set(cv2.CAP_PROP_POS_FRAMES, first)
        while capture.grab():
            number = number_at((capture.get(cv2.CAP_PROP_POS_MSEC) - begin) / 1000 * float(rate))
            if number is None:
                return
            yield number, lambda: _retrieved(capture, path, with_alpha)


@contextmanager
def _opened(path: str) -> Iterator[cv2.VideoCapture]:
    check_is_file(path)
    os.environ.setdefault(*FFMPEG_LEVEL)
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    has_ffmpeg = cv2.videoio_registry.hasBackend(cv2.CAP_FFMPEG)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG if has_ffmpeg else cv2.CAP_ANY)
    try:
        if not capture.isOpened():
            raise ImageFileError(
                f"{path} holds no video that OpenCV can read: it is damaged, or only sound, or of another kind (with"
                " PyAV, pip install av, more can be read)"
            )
        yield capture
    finally:
        capture.release()


def _retrieved(capture: cv2.VideoCapture, path: str, with_alpha: bool = False) -> np.ndarray:
    import cv2

    is_read, frame = capture.retrieve()
    if not is_read:
        raise ImageFileError(f"{path} has a frame that cannot be decoded")
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGBA if with_alpha else cv2.COLOR_BGR2RGB)  # opaque
