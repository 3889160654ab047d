"""How FramePack cuts a clip into sections: which frames each one makes, which others it sees, and their places in time.

A clip of S * w + 1 latent frames is a first frame and S sections of w frames. A section sees the first frame and 19
others, the nearest as it is, two at half and sixteen at a quarter of the resolution. The plain model makes sections
from the last to the first and sees the frames that follow; the one called F1 goes forward and sees those before. All
functions here compute with numbers alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from library.core.errors import ConfigError, Problems, did_you_mean

WINDOW = 9
"""latent frames of a section, as the released models learned it"""
NEAR, MIDDLE, FAR = 1, 2, 16
"""frames that a section sees as they are, at half and at a quarter of the resolution"""
HISTORY = NEAR + MIDDLE + FAR
STRIDE = 4
"""frames of a clip in a latent frame"""
FPS = 30
"""of the clips that the models learned: what `--video_seconds` is counted in"""

Numbers = tuple[int, ...]
Frames = tuple["int | None", ...]
"""latent frames by their number, None = a frame of zeros"""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Places in time of the frames that a section makes and of those that it sees."""

    latent: Numbers
    near: Numbers
    middle: Numbers
    far: Numbers


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of a clip. `padding`: how many sections the plain model is told to lie between its frames and the
    first one; None of F1. `near`, `middle`, `far`: the frames that it sees."""

    number: int
    padding: int | None
    target: Numbers
    places: Places
    near: Frames
    middle: Frames
    far: Frames


def frames_needed(window: int, sections: int = 1) -> int:
    """Frames of the shortest clip of so many sections."""
    return STRIDE * window * sections + 1


def sections_in(frames: int, window: int) -> int:
    """Whole sections of a clip; 0 when it is too short for one."""
    return max((frames - 1) // STRIDE, 0) // window


def usable_frames(frames: int, window: int) -> int:
    """Frames of a clip that its sections hold. ConfigError, naming the frames needed, when there is none."""
    sections = sections_in(frames, window)
    if not sections:
        raise ConfigError(
            f"a clip has {frames} frame{'s' if frames != 1 else ''}; a section of {window} latent frames needs at least"
            f" {frames_needed(window)}"
        )
    return frames_needed(window, sections)


def paddings(sections: int, given: Sequence[int] = ()) -> list[int]:
    """Paddings of the plain model from the last section to the first: in a long clip the middle ones are told to be
    nearer than they are, so that the first frame is not forgotten. `given` replaces the first ones."""
    usual = [3, *[2] * (sections - 3), 1, 0] if sections > 4 else list(range(sections - 1, -1, -1))
    return [*given, *usual[len(given) :]][:sections]


def places_after(window: int, padding: int) -> Places:
    """Those of the plain model: [first | padding | made | 1 | 2 | 16]."""
    made = 1 + padding * window
    behind = made + window
    return Places(
        latent=tuple(range(made, behind)), near=(0, behind), middle=tuple(range(behind + NEAR, behind + NEAR + MIDDLE)),
        far=tuple(range(behind + NEAR + MIDDLE, behind + HISTORY)),
    )  # fmt: skip


def places_before(window: int) -> Places:
    """Those of F1: [first | 16 | 2 | 1 | made]."""
    far, middle = 1 + FAR, 1 + FAR + MIDDLE
    return Places(
        latent=tuple(range(1 + HISTORY, 1 + HISTORY + window)), near=(0, HISTORY), middle=tuple(range(far, middle)),
        far=tuple(range(1, far)),
    )  # fmt: skip


def cut_history(is_f1: bool) -> tuple[slice, slice, slice]:
    """(near, middle, far): which of the 19 frames beside a section it sees how; they stand in the order of time."""
    if is_f1:
        return slice(-NEAR, None), slice(-NEAR - MIDDLE, -NEAR), slice(-HISTORY, -NEAR - MIDDLE)
    return slice(0, NEAR), slice(NEAR, NEAR + MIDDLE), slice(NEAR + MIDDLE, HISTORY)


def sections_of(latent_frames: int, window: int, *, is_f1: bool) -> list[Section]:
    """The sections of a clip of so many latent frames, in the order of time; what does not fill one is left out."""
    count = (latent_frames - 1) // window
    told: Iterable[int | None] = [None] * count if is_f1 else reversed(paddings(count))
    return [_section(number, count, padding, window) for number, padding in enumerate(told)]


def _section(number: int, count: int, padding: int | None, window: int) -> Section:
    first = 1 + number * window
    beside = range(first - HISTORY, first) if padding is None else range(first + window, first + window + HISTORY)
    there = [frame if 0 <= frame <= count * window else None for frame in beside]
    near, middle, far = (tuple(there[part]) for part in cut_history(padding is None))
    return Section(
        number=number, padding=padding, target=tuple(range(first, first + window)), near=(0, *near), middle=middle,
        far=far, places=places_before(window) if padding is None else places_after(window, padding),
    )  # fmt: skip


# -- making clips ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """One section that is made. `padding` is 0 of F1."""

    number: int
    padding: int
    places: Places


def count_sections(*, seconds: float, sections: int | None, window: int) -> int:
    """Sections of a clip that is made. Halves are rounded to the even number, as known programs do."""
    return sections if sections else max(round(seconds * FPS / (STRIDE * window)), 1)


def steps_of(count: int, window: int, *, is_f1: bool, given: Sequence[int] = ()) -> list[Step]:
    """Sections in the order in which they are made; `given`: further paddings of the plain model (see `paddings`)."""
    if is_f1:
        return [Step(number=number, padding=0, places=places_before(window)) for number in range(count)]
    return [
        Step(number=count - 1 - place, padding=padding, places=places_after(window, padding))
        for place, padding in enumerate(paddings(count, given))
    ]


def index_for(section: int, count: int, indices: Mapping[int, object]) -> int:
    """Which of the prompts or pictures, by their index, a section has: that of its place from the end (-1 = the last
    one), else of its place, else 0."""
    return next(index for index in (section - count, section, 0) if index in indices or index == 0)


_SPEC = re.compile(r"\s*(?:(?P<first>\d+)\s*-\s*(?P<last>\d+)|(?P<one>-?\d+))\s*:(?P<text>.*)", re.DOTALL)
SEPARATOR = ";;;"


def section_texts(text: str) -> dict[int, str]:
    """Texts by section of `spec:text;;;spec:text`, where spec is an index, one from the end (-1 = last) or a range a-b
    with both ends. Without `;;;`, or without a spec, a text is that of index 0; where 0 is missing it has the text of
    the smallest index from 0 on, else of the smallest. ConfigError for a range that runs backwards."""
    if SEPARATOR not in text:
        return {0: text}
    texts: dict[int, str] = {}
    for part in text.split(SEPARATOR):
        match = _SPEC.fullmatch(part)
        if match is None:
            texts[0] = part.strip()
            continue
        first = int(match["first"] or match["one"])
        last = int(match["last"] or match["one"])
        if last < first:
            raise ConfigError(f"the sections {first}-{last} of a prompt run backwards; write {last}-{first}")
        texts.update((index, match["text"].strip()) for index in range(first, last + 1))
    texts.setdefault(0, texts[min(texts, key=lambda index: (index < 0, index))])
    return texts


def unused_texts(text: str, count: int) -> list[int]:
    """Indices of `section_texts` whose text none of so many sections has."""
    texts = section_texts(text)
    used = {index_for(section, count, texts) for section in range(count)}
    shown = {texts[index] for index in used}
    return sorted(index for index in texts.keys() - used if texts[index] not in shown)


# -- one frame ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OneFrame:
    """A single frame that is made in view of control pictures. `near`: places of the pictures, and behind them that of
    a frame of zeros where `has_zero`; `middle` and `far`: places of frames of zeros, or none."""

    target: int
    near: Numbers
    has_zero: bool
    middle: Numbers
    far: Numbers


def one_frame(
    controls: int, window: int, *, target: int | None = None, control: Sequence[int] = (), post: bool = True,
    middle: bool = True, far: bool = True,
) -> OneFrame:
    """The places of a frame at `target` (the window's length when None) with so many control pictures at the places
    `control`, 0 where these are too few; one picture of zeros stands for none. `post`: a frame of zeros stands behind
    the window, `middle` and `far`: further ones are seen coarsely."""  # fmt: skip
    pictures = max(controls, 1)
    near = [*control, *[0] * pictures][:pictures]
    behind = places_after(window, 0)
    return OneFrame(
        target=window if target is None else target, near=(*near, *[1 + window] * post), has_zero=post,
        middle=behind.middle if middle else (), far=behind.far if far else (),
    )  # fmt: skip


_WORDS = ("default", "no_2x", "no_4x", "no_post", "target_index", "control_index")


def parse_one_frame(text: str, controls: int, window: int, option: str = "--one_frame_inference") -> OneFrame:
    """Of the comma list of `--one_frame_inference`: default, no_2x, no_4x, no_post, target_index=n,
    control_index=a;b. ConfigError tells all that is wrong in it."""
    problems, settings = Problems(), {"target_index": None, "control_index": ()}
    switches: set[str] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        word, sign, value = (piece.strip() for piece in part.partition("="))
        if word not in _WORDS or bool(sign) != (word in settings):
            problems.add(f"{option} has '{part}'{did_you_mean(word, _WORDS) or '.'} Known: {', '.join(_WORDS)}")
        elif not sign:
            switches.add(word)
        else:
            numbers = problems.attempt(lambda: _numbers(option, word, value))
            settings[word] = numbers and (numbers[0] if word == "target_index" else numbers)
    problems.raise_if_any()
    return one_frame(
        controls, window, target=settings["target_index"], control=settings["control_index"],
        post="no_post" not in switches, middle="no_2x" not in switches, far="no_4x" not in switches,
    )  # fmt: skip


def _numbers(option: str, word: str, value: str) -> Numbers:
    parts = value.split(";") if word == "control_index" else [value]
    if not all(part.strip().isdecimal() for part in parts):
        wanted = "places from 0 on, separated by ;" if word == "control_index" else "one place from 0 on"
        raise ConfigError(f"{option} has {word}={value}; needed: {wanted}")
    return tuple(int(part) for part in parts)
