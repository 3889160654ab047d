"""Wildcards of prompts: files, weights, depth, draws by the seed, and what is wrong told at the start."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from library.core.errors import ConfigError
from library.generation.gen_img.options import GenerationPromptOptions
from library.generation.requests import PictureRequest, SessionOptions
from library.generation.wan_options import WanRequest
from library.generation.wildcards import Wildcards, wildcard_problems, with_drawn_words


@pytest.fixture
def wildcards(tmp_path: Path) -> Wildcards:
    (tmp_path / "colors").mkdir()
    (tmp_path / "animal.txt").write_text("cat:3\n\n# none of these\ndog:1\n", encoding="utf-8")
    (tmp_path / "colors" / "autumn.txt").write_text('"red: dark":1\n12:30 o\'clock:x\nbrown __animal__\n', encoding="utf-8")
    (tmp_path / "hair_color.txt").write_text("日本語:2\n", encoding="utf-8")
    return Wildcards(str(tmp_path))


def test_lines_have_weights_only_behind_the_last_colon_and_only_numbers(wildcards: Wildcards) -> None:
    assert wildcards.entries("animal") == [("cat", 3.0), ("dog", 1.0)]
    assert wildcards.entries("colors/autumn") == [("red: dark", 1.0), ("12:30 o'clock:x", 1.0), ("brown __animal__", 1.0)]
    assert wildcards.expanded("__hair_color__ hair", 1) == "日本語 hair"


def test_draws_follow_weights_and_are_fixed_by_the_seed(wildcards: Wildcards) -> None:
    found = Counter(wildcards.expanded("a __animal__", seed) for seed in range(2000))
    assert set(found) == {"a cat", "a dog"} and 0.7 < found["a cat"] / 2000 < 0.8
    both = {wildcards.expanded("__animal__ and __animal__", seed) for seed in range(50)}
    assert len(both) == 4  # each has a draw of its own
    assert wildcards.expanded("__colors/autumn__", 7) == wildcards.expanded("__colors/autumn__", 7)
    assert any("brown cat" == wildcards.expanded("__colors/autumn__", seed) for seed in range(50))
    assert wildcards.expanded("snake_case__ and __ nothing", 1) == "snake_case__ and __ nothing"


def test_requests_get_their_seed_and_finished_texts(wildcards: Wildcards) -> None:
    request = PictureRequest(prompt="a __animal__", negative_prompt="__animal__", width=64, height=64)
    (made,) = with_drawn_words([request], wildcards.folder)
    assert made.seed is not None and made.prompt in ("a cat", "a dog") and made.negative_prompt in ("cat", "dog")
    assert list(with_drawn_words([made], wildcards.folder)) == [made]
    assert with_drawn_words([request], None) == [request]
    clip = dataclasses.replace(WanRequest(prompt="a", width=64, height=64), nag_prompt="__animal__")
    (drawn,) = with_drawn_words([clip], wildcards.folder)
    assert drawn.nag_prompt in ("cat", "dog") and "none.txt" in wildcard_problems(
        dataclasses.replace(clip, nag_prompt="__none__"), wildcards.folder
    )[0]
    typed = with_drawn_words(iter([request]), wildcards.folder)
    assert "__" not in next(iter(typed)).prompt


@pytest.mark.parametrize(("text", "told"), [
    ("__../secret__", "__../secret__"), ("__none__", "none.txt"), ("__empty__", "no line that can be drawn"),
    ("__heavy__", "a weight is 0 or more"), ("__outer__", "none.txt"),
])  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_drawn(wildcards: Wildcards, text: str, told: str) -> None:
    folder = Path(wildcards.folder)
    (folder / "empty.txt").write_text("# nothing\nx:0\n", encoding="utf-8")
    (folder / "heavy.txt").write_text("x:-1\n", encoding="utf-8")
    (folder / "outer.txt").write_text("x:1\n__none__:0\n", encoding="utf-8")
    request = PictureRequest(prompt="a cat", negative_prompt=text, width=64, height=64)
    problems = wildcard_problems(request, wildcards.folder)
    if text == "__../secret__":  # no name that a wildcard has: it stays text
        assert problems == []
    else:
        assert len(problems) == 1 and told in problems[0]


def test_wildcards_that_lead_back_to_themselves_end(wildcards: Wildcards) -> None:
    (Path(wildcards.folder) / "loop.txt").write_text("again __loop__\n", encoding="utf-8")
    assert wildcards.problems("__loop__") == []
    with pytest.raises(ConfigError, match="more than 50 deep"):
        wildcards.expanded("__loop__", 1)


@pytest.mark.parametrize("group", (SessionOptions, GenerationPromptOptions))
def test_options_take_a_folder_and_refuse_what_is_none(group: Any, tmp_path: Path) -> None:
    assert group(prompt_wildcards=str(tmp_path)).prompt_wildcards == str(tmp_path)
    with pytest.raises(ConfigError, match="needed: a folder with files NAME.txt"):
        group(prompt_wildcards=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="--prompt_wildcards is ''; needed: a folder"):
        group(prompt_wildcards="")


def test_a_line_with_its_own_wildcard_twice_is_told_at_once(tmp_path):
    (tmp_path / "loop.txt").write_text("__loop__ and __loop__\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="leads back to itself"):
        Wildcards(str(tmp_path)).expanded("__loop__", 1)
