"""Clips that are cut out of videos, conversion of rates, and both on real files whose frames carry their numbers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from library.dataset.clips.rates import Conversion, converted_count
from library.dataset.clips.settings import ClipSettings
from library.dataset.clips.video_check import VideoCheck
from library.dataset.clips.video_files import frames_of, look_at_video
from library.dataset.clips.windows import ClipWindow, windows_of
from tests.golden_dir import BEHAVIOUR_DIR, behaviour, behaviour_cases

FILE = "video_frames.json"
STRIDE = 4
SETTINGS = ("target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames")
RULE = "hold"
"""where the recorded values leave a choice, this one in all cases"""


def settings_of(values: dict) -> ClipSettings:
    given = {name: values[name] for name in SETTINGS}
    return ClipSettings(**{**given, "target_frames": tuple(given["target_frames"])})


def chosen(expected: dict) -> dict:
    alternatives = expected.get("any_of")
    return next(entry for entry in alternatives if RULE in entry["rules"]) if alternatives else expected


def unrolled(runs: list) -> list[int]:
    return [n for run in runs for n in ([run] if isinstance(run, int) else range(run[0], run[1] + 1))]


def number_in(frame: np.ndarray) -> int:
    """Eight blocks of 16 x 16, row by row, highest bit first."""
    middles = frame[8::16, 8::16].mean(axis=-1).reshape(-1) > 127
    return int("".join(str(int(bit)) for bit in middles), 2)


@lru_cache
def checked(file: str) -> VideoCheck:
    return look_at_video(str(BEHAVIOUR_DIR / file))


def conversion_of(given: dict) -> Conversion | None:
    check, target = checked(given["video"]), behaviour(FILE)["target_fps"][given["architecture"]]
    match given["conversion"]:
        case "none":
            return None
        case "container":
            return Conversion.own(check.rate, check.times, target)
        case rate:
            return Conversion.given(rate, target)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "clips"))
def test_clips(case):
    settings, expected = settings_of(case["input"]), case["expected"]
    in_effect = settings.in_effect(STRIDE)
    found = windows_of(case["input"]["frames"], settings, STRIDE)
    assert list(in_effect.target_frames) == expected["target_frames"]
    assert in_effect.frame_extraction == expected["frame_extraction"]
    assert sorted(found) == sorted(map(tuple, expected["clips"])) and len(set(found)) == len(found)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "fps"))
def test_rates(case):
    given, expected = case["input"], chosen(case["expected"])
    conversion = Conversion.given(given["source_fps"], given["target_fps"])
    frames = [conversion.frame(number) for number in range(conversion.count(given["frames"]))][: given["limit"]]
    assert frames == unrolled(expected["frames"]) and len(frames) == expected["count"]


@pytest.mark.parametrize("video", behaviour_cases(FILE, "videos"))
def test_files(video):
    check = checked(video["file"])
    assert list(check.size) == video["shown_size"] and check.frames == video["frames"]
    if video["frame_rate"]:
        assert str(check.rate) == video["frame_rate"] and not check.times
    else:
        assert [round(time * 1000) for time in check.times] == video["times_ms"]
    frames = list(frames_of(str(BEHAVIOUR_DIR / video["file"]), range(check.frames)))
    turned_back = [np.rot90(frame, video["rotation_clockwise"] // 90) for frame in frames]
    assert [number_in(frame) for frame in turned_back] == list(range(video["frames"]))


@pytest.mark.parametrize("case", behaviour_cases(FILE, "video_clips"))
def test_clips_of_files(case):
    given, expected = case["input"], chosen(case["expected"])
    conversion = conversion_of(given)
    count = converted_count(checked(given["video"]).frames, conversion)
    assert ClipWindow(0, count, conversion=conversion).frame_numbers() == unrolled(expected["loaded"])
    found = windows_of(count, settings_of(given), STRIDE)
    assert sorted(found) == sorted(map(tuple, expected["clips"]))


def test_frames_that_a_clip_reads():
    """One clip of each conversion, from the pixels of the files."""
    cases = {(c["input"]["video"], str(c["input"]["conversion"])): c for c in behaviour(FILE)["video_clips"]}
    for case in cases.values():
        given, expected = case["input"], chosen(case["expected"])
        for start, length in expected["clips"][-1:]:
            window = ClipWindow(start, length, conversion=conversion_of(given))
            frames = frames_of(str(BEHAVIOUR_DIR / given["video"]), window.frame_numbers())
            assert [number_in(frame) for frame in frames] == unrolled(expected["loaded"])[start : start + length]
