"""Frame rates: which frames of a video make a clip of another rate. Exact arithmetic, pure functions.

Two rules. A source rate that is given and no lower than the target drops frames:
frame k of the clip is the first frame that begins at or after k/target. All else holds frames: frame k is the last one
that begins at or before k/target, so that slow videos repeat frames and those with their own times keep their speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    """From the frames of a file to `target` frames per second. `source`: the file's rate; None: its own times count."""

    target: Fraction
    source: Fraction | None = None

    @property
    def words(self) -> str:
        """As it stands in records of caches: what a cached clip hangs on."""
        return f"{'own times' if self.source is None else self.source} to {self.target} fps"


def exact_rate(fps: float) -> Fraction:
    """A rate as it was written: 29.97 is 2997/100."""
    return Fraction(str(fps))


def stored_rate(fps: float) -> Fraction | None:
    """The rate that a float of a video's header stands for (30000/1001 for 29.97002997); None where there is none."""
    if not math.isfinite(fps) or fps <= 0:
        return None
    return Fraction(fps).limit_denominator(1001)


def frames_at(count: int, conversion: Conversion | None, times: Sequence[Fraction] = ()) -> list[int]:
    """Numbers of the file's frames that make the clip, in order. `count`: frames of the file, `times`: when each begins
    [s], read only where the conversion goes by them. Without a conversion all of them."""
    if conversion is None:
        return list(range(count))
    if conversion.source is not None:
        return list(_by_rate(count, conversion.source, conversion.target))
    times = list(times)
    rate = constant_rate(times)
    return list(_held(count, rate, conversion.target) if rate else _by_times(times, conversion.target))


def _by_rate(count: int, source: Fraction, target: Fraction) -> Iterator[int]:
    if source < target:
        yield from _held(count, source, target)
        return
    step, number = source / target, 0
    while (frame := math.ceil(number * step)) < count:
        yield frame
        number += 1


def _held(count: int, source: Fraction, target: Fraction) -> Iterator[int]:
    """As long as the last frame has not begun, and once when it does."""
    step = source / target
    for number in range(math.floor((count - 1) / step) + 1 if count else 0):
        yield math.floor(number * step)


def _by_times(times: Sequence[Fraction], target: Fraction) -> Iterator[int]:
    frame, number = 0, 0
    begins = [time - times[0] for time in times]
    while begins and number / target <= begins[-1] + TIME_STEP:
        while frame + 1 < len(begins) and begins[frame + 1] <= number / target + TIME_STEP:
            frame += 1
        yield frame
        number += 1


def constant_rate(times: Sequence[Fraction]) -> Fraction | None:
    """The rate of frames that begin at even distances, as far as a container's clock of 1/1000 s tells; None where they
    do not, or there are fewer than three."""
    if len(times) < 3 or times[-1] <= times[0]:
        return None
    mean = (len(times) - 1) / (times[-1] - times[0])
    for rate in dict.fromkeys((_common_rate(mean), mean)):
        if rate and all(abs(time - times[0] - number / rate) <= CLOCK for number, time in enumerate(times)):
            return rate
    return None


def _common_rate(mean: Fraction) -> Fraction | None:
    """The whole rate, or the one of NTSC (1000/1001 of it), which a mean of rounded times stands for."""
    whole = Fraction(round(mean))
    candidates = (whole, whole * Fraction(1000, 1001))
    best = min(candidates, key=lambda rate: abs(rate - mean))
    return best if best > 0 and abs(best - mean) / best < Fraction(1, 1000) else None


def differs_from(fps: Fraction, target: Fraction) -> bool:
    """Whether a clip of `fps` taken frame by frame shows another speed than the one that is trained."""
    return abs(fps - target) > RATE_NOTICE * target
