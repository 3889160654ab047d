"""Folders of pictures that are the frames of one video, in the order of their names; a picture is a video of one
frame."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

import numpy as np

from library.dataset.clips.video_check import VideoCheck
from library.dataset.image_headers import look_at_image
from library.dataset.media_utils import ImageFileError, decode_image, image_extensions


def is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in image_extensions()


def frame_files(folder: str) -> list[str]:
    """Its pictures, sorted by name. ImageFileError where there are none."""
    extensions = image_extensions()
    if not os.path.isdir(folder):
        return [folder]
    try:
        names = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in extensions)
    except OSError as error:
        raise ImageFileError(f"{folder} cannot be read ({error.strerror})") from error
    if not names:
        raise ImageFileError(f"{folder} holds no pictures; a folder of frames has one for each frame")
    return [os.path.join(folder, name) for name in names]


def look(folder: str) -> VideoCheck:
    """Size of the first frame and number of frames; the header of every frame is read. Raises ImageFileError."""
    checks = [look_at_image(path) for path in frame_files(folder)]
    return VideoCheck(
        checks[0].size, deep=any(check.deep for check in checks), transparent=any(c.transparent for c in checks),
        invisible=all(check.invisible for check in checks), frames=len(checks),
        mixed_sizes=len({check.size for check in checks}) > 1,
    )


def each_frame(folder: str, with_alpha: bool) -> Iterator[Callable[[], np.ndarray]]:
    """For every frame, what gives its pixels [H, W, 3 or 4]; frames that nobody asks for are not opened."""
    for path in frame_files(folder):
        yield functools.partial(decode_image, path, with_alpha=with_alpha)
