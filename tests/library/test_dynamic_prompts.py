"""Prompts with choices: counts, separators, enumerations, nesting, escapes, keys and errors."""

from __future__ import annotations

from collections import Counter

import pytest

from library.core.errors import ConfigError
from library.generation.gen_img.dynamic_prompts import expand_prompt, is_dynamic


def one(prompt: str, seed: int = 0) -> str:
    (text,) = expand_prompt(prompt, seed)
    return text


def test_one_of_several_about_evenly():
    counts = Counter(one("a {red|green|blue} car", seed) for seed in range(600))
    assert set(counts) == {"a red car", "a green car", "a blue car"}
    assert min(counts.values()) > 140


def test_the_same_seed_gives_the_same_text():
    prompt = "{a|b|c|d} {e|f|g|h} {2$$i|j|k}"
    assert one(prompt, 7) == one(prompt, 7)
    assert len({one(prompt, seed) for seed in range(50)}) > 20


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("plain, (weighted:1.2)", "plain, (weighted:1.2)"), ("{A}", "A"), ("{}", ""), ("x{ A }y", "x A y"),
        (r"\{a|b\}", "{a|b}"), (r"{\{|\{}", "{"), ("{{{A}}}", "A"), ("{1$$A}", "A"), ("{0$$A|B}", ""),
        ("{1-1$$ and $$A}", "A"),
        ("{{1}$$A}", "A"),
    ],
)  # fmt: skip
def test_texts_without_a_real_choice(prompt, expected):
    assert one(prompt) == expected


def test_several_without_repeats_in_any_order():
    texts = {one("{2$$A|B|C}", seed) for seed in range(100)}
    assert texts == {f"{x}, {y}" for x in "ABC" for y in "ABC" if x != y}


def test_a_range_of_counts_and_a_separator():
    texts = {one("{1-2$$ and $$A|B}", seed) for seed in range(100)}
    assert texts == {"A", "B", "A and B", "B and A"}


def test_nested_groups_are_resolved_first():
    assert {one("{x {a|b}|y}", seed) for seed in range(60)} == {"x a", "x b", "y"}


def test_a_chosen_text_is_plain_for_the_group_around_it():
    assert {one("{{2$$|$$a|b} z|c}", seed) for seed in range(60)} == {"a|b z", "b|a z", "c"}


def test_enumerations_give_every_combination():
    assert expand_prompt("{e$$a|b} {e$$1|2|3}", 0) == [f"{x} {y}" for x in "ab" for y in "123"]


def test_every_combination_draws_as_if_it_were_alone():
    texts = expand_prompt("{e$$a|b|c} {1|2|3|4|5|6|7|8|9}", 3)
    assert [text[0] for text in texts] == ["a", "b", "c"]
    assert len({text[2] for text in texts}) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{a|b", "has a '{' without"), ("a}", "has a '}' without"), ("{3$$a|b}", "asks for 3 of 2 options"),
        ("{2-1$$a|b}", "asks for 2-1 of 2"), ("{x$$a|b}", "has the group {x$$a|b}"),
        ("{e$$ and $$a|b}", "has the group"),
        ("{1$$x$$y$$a}", "has the group"),
        ("{e$$" + "|".join("abcdefghij") + "}" + "{e$$1|2|3|4|5|6|7|8|9|0}" * 4, "more than 10000"),
    ],
)  # fmt: skip
def test_mistakes_are_told(prompt, message):
    with pytest.raises(
        ConfigError, match=message.replace("{", r"\{").replace("}", r"\}").replace("$", r"\$").replace("|", r"\|")
    ):
        expand_prompt(prompt, 0)


def test_is_dynamic():
    assert is_dynamic("a {b|c}") and not is_dynamic(r"a \{b|c\}")
