"""What is known of a video before it is used, whichever reader looked at it."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from library.dataset.clips.rates import constant_rate
from library.dataset.media_utils import ImageCheck, ImageFileError, Size

PROMISE = Fraction(98, 100)
"""of the frames that a header names must be there; many containers only estimate"""

OFF_PLACE = 0.2
"""of a frame's duration: so far may the time of a frame be from its place"""


@dataclass(frozen=True)
class VideoCheck(ImageCheck):
    """`size` is that of the first frame as shown."""

    frames: int = 1
    rate: Fraction | None = None
    """frames per second, a mean where they are uneven; None of a folder of frames"""
    times: tuple[Fraction, ...] = ()
    """when frames begin [s], the first at 0, where they are uneven"""
    promised: int = 0
    """frames that the header names; 0: it names none"""
    reads_alpha: bool = True
    """whether the reader gives the alpha channel that a transparent video has"""
    mixed_sizes: bool = False
    """whether frames of a folder differ in size"""

    @property
    def even_rate(self) -> Fraction | None:
        """The rate, where frames begin at even distances."""
        return None if self.times else self.rate

    @property
    def is_cut(self) -> bool:
        """Whether fewer frames can be read than the header names."""
        return self.frames + 1 < self.promised * PROMISE


def timed_check(
    size: Size, times: Sequence[Fraction], header_rate: Fraction | None, promised: int, transparent: bool
) -> VideoCheck:
    """Of a file whose frames begin at these times; where they do not rise, the header's rate counts."""
    rate, uneven = constant_rate(times, header_rate), ()
    if rate is None:
        rises = len(times) > 1 and all(a < b for a, b in zip(times, times[1:]))
        rate = (len(times) - 1) / (times[-1] - times[0]) if rises else header_rate
        uneven = tuple(time - times[0] for time in times) if rises else ()
    return VideoCheck(
        size, transparent=transparent, frames=len(times), rate=rate, times=uneven, promised=promised
    )


def check_is_file(path: str) -> None:
    """ImageFileError for what is missing, empty or no file: readers have poorer words for it."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise ImageFileError(f"{path} does not exist") from error
    except OSError as error:
        raise ImageFileError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageFileError(f"{path} is a pipe or a device; the file of a video, or a folder of frames, is needed")
    if status.st_size == 0:
        raise ImageFileError(f"{path} is an empty file (0 bytes)")


def number_at(place: float) -> int | None:
    """The number of the frame that begins at this multiple of a frame's duration, which containers round a little; None
    where no frame begins."""
    number = round(place)
    return number if abs(place - number) < OFF_PLACE else None


def no_frames(path: str) -> ImageFileError:
    return ImageFileError(f"{path} has a video stream of which no frame can be decoded")
