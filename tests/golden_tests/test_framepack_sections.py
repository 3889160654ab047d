"""Sections of clips, places in time, texts of sections and single frames against recorded values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from library.components import framepack_sections as sections
from library.core.errors import ConfigError
from tests.golden_dir import behaviour_cases

FILE = "framepack_sections.json"
PARTS = (("clean_latents", "near"), ("clean_latents_2x", "middle"), ("clean_latents_4x", "far"))
INDICES = (
    ("latent_indices", "latent"), ("clean_latent_indices", "near"), ("clean_latent_2x_indices", "middle"),
    ("clean_latent_4x_indices", "far"),
)  # fmt: skip


def spread(recorded: Sequence[Any]) -> tuple[Any, ...]:
    """A recorded list with its runs [first, last] and repeats name*n written out."""
    found: list[Any] = []
    for one in recorded:
        if isinstance(one, list):
            found += range(one[0], one[1] + 1)
        elif isinstance(one, str) and "*" in one:
            name, _, times = one.partition("*")
            found += [name] * int(times)
        else:
            found.append(one)
    return tuple(found)


def check_places(places: sections.Places, recorded: dict[str, Any]) -> None:
    for theirs, ours in INDICES:
        assert getattr(places, ours) == spread(recorded[theirs]), theirs


@pytest.mark.parametrize("case", behaviour_cases(FILE, "cache"))
def test_sections_of_a_clip(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    used, window = sections.usable_frames(given["frames"], given["window"]), given["window"]
    assert used == expected["video_frames_used"] and sections.sections_in(used, window) == expected["sections"]
    latent_frames = 1 + (used - 1) // sections.STRIDE
    assert latent_frames == expected["latent_frames_used"]
    made = {section.number: section for section in sections.sections_of(latent_frames, window, is_f1=given["f1"])}
    told = [made[number].padding for number in sorted(made, reverse=True)]
    assert len(made) == expected["sections"] and told == (expected["paddings"] or [None] * len(made))
    for recorded in expected["list"]:
        section = made[recorded["section"]]
        assert section.target == spread(recorded["target_frames"]) and section.padding == recorded["padding"]
        check_places(section.places, recorded)
        for theirs, ours in PARTS:
            assert getattr(section, ours) == spread(recorded[theirs]), theirs


@pytest.mark.parametrize("case", behaviour_cases(FILE, "refused"))
def test_clips_that_are_too_short(case: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"at least {case['needed']}$"):
        sections.usable_frames(case["input"]["frames"], case["input"]["window"])


@pytest.mark.parametrize("case", behaviour_cases(FILE, "training_samples"))
def test_sections_of_samples_while_training(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    count = sections.sections_in(given["frame_count"], given["window"])
    assert count == expected["sections"]
    if count:
        assert sections.frames_needed(given["window"], count) == expected["frame_count_used"]
        assert sections.paddings(count) == expected["paddings"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "generate"))
def test_sections_in_the_order_in_which_they_are_made(case: dict[str, Any]) -> None:
    """The frames around a section, followed by name through all steps."""
    given, expected = case["input"], case["expected"]
    options = {"video_seconds": 5, "video_sections": None, "latent_window_size": 9, "f1": False, **given["options"]}
    window, is_f1 = options["latent_window_size"], options["f1"]
    count = sections.count_sections(
        seconds=options["video_seconds"], sections=options["video_sections"], window=window
    )
    assert count == expected["sections"]
    texts, pictures = ({int(index): "" for index in given[f"section_{kind}"]} for kind in ("prompts", "images"))
    paddings = [int(text) for text in options.get("latent_paddings", "").split(",") if text]
    steps = sections.steps_of(count, window, is_f1=is_f1, given=paddings)
    history = ["zero"] * sections.HISTORY
    if is_f1:
        history += [f"start{sections.index_for(0, count, pictures)}"]
    elif given["end_image"]:
        history = ["end", *history]
    for place, (step, recorded) in enumerate(zip(steps, expected["order"], strict=True)):
        assert (step.number, step.padding) == (recorded["section"], recorded["padding"])
        assert sections.index_for(step.number, count, texts) == recorded["prompt"]
        picture = sections.index_for(step.number, count, pictures)
        assert picture == recorded["image"]
        check_places(step.places, recorded)
        near, middle, far = (tuple(history[part]) for part in sections.cut_history(is_f1))
        seen = ((f"start{picture}", *near), middle, far)
        assert seen == tuple(spread(recorded[theirs]) for theirs, _ in PARTS)
        made = [f"s{place}"] * window
        history = history + made if is_f1 else made + history


@pytest.mark.parametrize("case", behaviour_cases(FILE, "section_texts"))
def test_texts_of_sections(case: dict[str, Any]) -> None:
    found = sections.section_texts(case["input"]["text"])
    assert {str(index): text for index, text in found.items()} == case["expected"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "one_frame"))
def test_single_frames(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    found = sections.parse_one_frame(given["one_frame_inference"], given["controls"], given["window"])
    pictures = [f"control{number}" for number in range(given["controls"])] or ["zero"]
    assert found.target == expected["target_index"]
    assert [*pictures, *["zero"] * found.has_zero] == expected["clean_latents"]
    assert list(found.near) == expected["clean_latent_indices"]
    for recorded, places in (("2x", found.middle), ("4x", found.far)):
        indices = expected[f"clean_latent_{recorded}_indices"]
        assert places == (spread([indices]) if indices else ())
