"""Sections of FramePack by hand, and what is told about settings that are wrong."""

from __future__ import annotations

import pytest

from library.components.framepack_sections import (
    index_for,
    paddings,
    parse_one_frame,
    places_after,
    places_before,
    section_texts,
    sections_of,
)
from library.core.errors import ConfigError


def test_two_sections_of_three_frames_by_hand() -> None:
    """Seven latent frames: 0 | 1 2 3 | 4 5 6."""
    first, second = sections_of(7, 3, is_f1=False)
    assert (first.target, first.padding, first.near, first.middle) == ((1, 2, 3), 0, (0, 4), (5, 6))
    assert first.far == (None,) * 16
    assert (second.target, second.padding, second.near, second.middle) == ((4, 5, 6), 1, (0, None), (None, None))
    assert first.places.latent == (1, 2, 3) and first.places.near == (0, 4) and first.places.far[0] == 7
    assert second.places.latent == (4, 5, 6) and second.places.near == (0, 7)
    first, second = sections_of(7, 3, is_f1=True)
    assert (first.near, first.middle, first.far) == ((0, 0), (None, None), (None,) * 16)
    assert (second.near, second.middle, second.far) == ((0, 3), (1, 2), (*(None,) * 15, 0))
    assert first.places == second.places == places_before(3)


def test_places_meet_and_paddings_follow_the_rule() -> None:
    for window, padding in ((9, 0), (4, 3)):
        places = places_after(window, padding)
        every = [*places.latent, *places.near[1:], *places.middle, *places.far]
        assert every == list(range(1 + padding * window, 1 + padding * window + window + 19))
    assert [paddings(count) for count in (1, 4, 5, 7)] == [[0], [3, 2, 1, 0], [3, 2, 2, 1, 0], [3, 2, 2, 2, 2, 1, 0]]
    assert paddings(2, (7, 6, 5)) == [7, 6]


def test_indices_of_prompts() -> None:
    assert [index_for(section, 3, {0: "", -1: "", 1: ""}) for section in range(3)] == [0, 1, -1]
    assert index_for(2, 3, {}) == 0
    assert section_texts("0:a\nb;;;1-1:c") == {0: "a\nb", 1: "c"}
    with pytest.raises(ConfigError, match="sections 3-1 of a prompt run backwards; write 1-3"):
        section_texts("3-1:a;;;0:b")


def test_words_of_a_single_frame_that_are_wrong_are_told_together() -> None:
    with pytest.raises(ConfigError) as told:
        parse_one_frame("no2x,target_index,control_index=a;1,no_post=1,target_index=-1", 1, 9)
    text = str(told.value)
    for part in (
        "'no2x'; did you mean 'no_2x'?", "has 'target_index'", "control_index=a;1", "has 'no_post=1'",
        "target_index=-1; needed: one place",
    ):  # fmt: skip
        assert part in text, part
