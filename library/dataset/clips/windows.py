"""Which clips are cut out of a video: places in the list of its frames after the rate is converted. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from library.dataset.clips.rates import Conversion
from library.dataset.clips.settings import ClipSettings, whole_frames


@dataclass(frozen=True)
class ClipWindow:
    """A clip of a video: `length` frames from `start` on, in the list after `conversion` (None: the file's own
    frames). `section`: which part of the clip is learned, where a family cuts clips into sections."""

    start: int
    length: int
    section: int | None = None
    conversion: Conversion | None = None
    file_rate: Fraction | None = field(default=None, compare=False, repr=False)
    """frames per second of the file, where they are even; makes reading quicker and changes nothing"""

    @property
    def key(self) -> tuple[int, ...]:
        """Tells the clips of one file apart."""
        return (self.start, self.length) if self.section is None else (self.start, self.length, self.section)

    def frame_numbers(self) -> list[int]:
        """Numbers of the file's frames, in order; they never fall."""
        numbers = range(self.start, self.start + self.length)
        return list(numbers) if self.conversion is None else [self.conversion.frame(number) for number in numbers]

    @property
    def words(self) -> str:
        """For people and for records of caches."""
        section = "" if self.section is None else f", section {self.section}"
        rate = "" if self.conversion is None else f" at {self.conversion.words}"
        return f"frames {self.start} to {self.start + self.length - 1}{rate}{section}"


@dataclass(frozen=True)
class ControlClip:
    """The list of frames that a control video makes: as `frames` says, and its last frame for all that come after."""

    frames: int
    conversion: Conversion | None = None
    file_rate: Fraction | None = field(default=None, compare=False, repr=False)

    def frame_numbers(self, window: ClipWindow) -> list[int]:
        """Numbers of the control file's frames that belong to the frames of a clip."""
        last = self.frames - 1
        places = [min(place, last) for place in range(window.start, window.start + window.length)]
        return places if self.conversion is None else [self.conversion.frame(place) for place in places]


def windows_of(frames: int, settings: ClipSettings, temporal_stride: int | None) -> list[tuple[int, int]]:
    """(start, length) of the clips of a video of so many frames, each once: by length, then by start. Empty where the
    video is too short for every length."""
    settings = settings.in_effect(temporal_stride)
    if settings.frame_extraction == "full":
        lengths = [whole_frames(min(frames, settings.max_frames), temporal_stride or 1)] if frames else []
    else:
        lengths = [length for length in settings.target_frames if length <= frames]
    found = ((start, length) for length in lengths for start in _starts(frames, length, settings))
    return list(dict.fromkeys(found))


def _starts(frames: int, length: int, settings: ClipSettings) -> Iterator[int]:
    last = frames - length
    match settings.frame_extraction:
        case "chunk":
            yield from range(0, last + 1, length)
        case "slide":
            yield from range(0, last + 1, settings.frame_stride)
        case "uniform":
            yield from (number * last // (settings.frame_sample - 1) for number in range(settings.frame_sample))
        case _:
            yield 0


def frames_needed(settings: ClipSettings, temporal_stride: int | None) -> int:
    """The fewest frames of which a clip can be made."""
    settings = settings.in_effect(temporal_stride)
    return 1 if settings.frame_extraction == "full" else min(settings.target_frames)
