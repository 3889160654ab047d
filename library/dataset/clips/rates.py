"""Frame rates: which frames of a video make a clip of another rate. Exact arithmetic, pure functions.

Two rules. A source rate that is given and no lower than the target drops frames: frame k of the clip is the first frame
that begins at or after k/target. All else holds frames: frame k is the last one that begins at or before k/target, so
that slow videos repeat frames, and files that go by their own times keep their speed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

TIME_STEP = Fraction(1, 1_000_000)
"""seconds; times of files are compared as fine as this"""
CLOCK = Fraction(1, 1000)
"""seconds; what Matroska and others round times to"""
RATE_NOTICE = Fraction(5, 100)
"""a file's rate may differ so much from the one that is trained before it is mentioned"""


@dataclass(frozen=True)
class Conversion:
    """From the frames of a file to `target` frames per second."""

    target: Fraction
    source: Fraction | None = None
    """frames per second of the file; None where they are uneven"""
    is_own: bool = False
    """whether the file's own times count, and not a rate that was given"""
    times: tuple[Fraction, ...] = ()
    """when its frames begin [s], the first at 0, where they are uneven"""

    @classmethod
    def given(cls, source: float, target: float) -> Conversion:
        """From the rate that is written for the files of a dataset."""
        return cls(exact_rate(target), exact_rate(source))

    @classmethod
    def own(cls, rate: Fraction | None, times: Sequence[Fraction], target: float) -> Conversion:
        """From the times in the file itself: even ones by their rate, or each for itself."""
        even = None if times else rate
        return cls(exact_rate(target), even, is_own=True, times=tuple(time - times[0] for time in times))

    def count(self, frames: int) -> int:
        """Frames of the clip that a file of so many frames makes: up to the one that begins last."""
        if frames == 0:
            return 0
        if self.source is None:
            return math.floor((self.times[-1] + TIME_STEP) * self.target) + 1
        return math.floor((frames - 1) * self.target / self.source) + 1

    def frame(self, number: int) -> int:
        """Number of the file's frame that stands at this place of the clip."""
        if self.source is None:
            return bisect_right(self.times, number / self.target + TIME_STEP) - 1
        place = number * self.source / self.target
        return math.floor(place) if self.is_own or self.source < self.target else math.ceil(place)

    @property
    def words(self) -> str:
        """What a cached clip hangs on, beside the file."""
        return f"{'own times' if self.is_own else self.source} to {self.target} fps"


def converted_count(frames: int, conversion: Conversion | None) -> int:
    """Frames of the list that clips are cut from; without a conversion all frames of the file."""
    return frames if conversion is None else conversion.count(frames)


def exact_rate(fps: float) -> Fraction:
    """A rate as it was written: 29.97 is 2997/100."""
    return Fraction(str(fps))


def stored_rate(fps: float) -> Fraction | None:
    """The rate that a float of a video's header stands for (30000/1001 for 29.97002997); None where there is none."""
    return Fraction(fps).limit_denominator(1001) if math.isfinite(fps) and fps > 0 else None


def constant_rate(times: Sequence[Fraction], header: Fraction | None = None) -> Fraction | None:
    """The rate of frames that begin at even distances; None where they do not. `header`: the rate that the file names.
    Of times that a container has rounded it is the whole rate, or the one of NTSC (1000/1001 of it), that they stand
    for."""
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    mean = (len(times) - 1) / (times[-1] - times[0])
    whole = Fraction(max(round(mean), 1))
    fits = ((header, TIME_STEP), (whole, CLOCK / 2), (whole * Fraction(1000, 1001), CLOCK / 2), (mean, CLOCK))
    for rate, most in fits:
        if rate and all(abs(time - times[0] - number / rate) <= most for number, time in enumerate(times)):
            return rate
    return None


def differs_from(rate: Fraction, target: float) -> bool:
    """Whether a clip of this rate, taken frame by frame, has another speed than the one that is trained."""
    return abs(rate - exact_rate(target)) > RATE_NOTICE * exact_rate(target)
