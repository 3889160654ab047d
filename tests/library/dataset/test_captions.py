"""Captions: what the reference cases do not reach."""

from __future__ import annotations

import random
import re

import pytest

from library.core.errors import ConfigError
from library.dataset.captions import (
    caption_paths,
    deterministic_caption,
    metadata_caption,
    process_caption,
    random_caption_settings,
    read_caption,
    tag_frequency,
)
from library.dataset.items import SubsetParams


def processed(caption: str, seed: int = 0, epoch: int = 1, step: int = 0, **settings) -> str:
    return process_caption(
        caption, SubsetParams(**settings), rng=random.Random(seed), epoch=epoch, step=step, max_train_steps=100
    )


def test_every_line_carries_prefix_and_suffix():
    results = {
        processed("one\ntwo", seed, enable_wildcard=True, caption_prefix="p", caption_suffix="s") for seed in range(50)
    }
    assert results == {"p one s", "p two s"}
    assert processed("one\ntwo", caption_suffix="s") == "one s"


def test_a_whole_caption_keeps_its_lines_unless_one_is_chosen():
    whole = {"whole_captions": True, "caption_prefix": "p"}
    assert processed("one\ntwo", **whole) == "p one\ntwo"
    assert deterministic_caption("one\ntwo", SubsetParams(**whole)) == "p one\ntwo"
    assert {processed("one\ntwo", seed, enable_wildcard=True, **whole) for seed in range(50)} == {"p one", "p two"}


@pytest.mark.parametrize(
    ("extension", "whole", "name"),
    [(".txt", True, "a.txt"), ("txt", True, "a.txt"), ("_cap.txt", True, "a_cap.txt"), ("cap.txt", False, "a.cap.txt")],
)
def test_endings_of_caption_files(extension, whole, name):
    assert caption_paths("a.png", SubsetParams(caption_extension=extension, whole_captions=whole)) == [name]
    assert caption_paths("a.png", SubsetParams(caption_extension=None, whole_captions=whole)) == []


def test_the_separator_never_stays_in_the_text():
    assert processed("a ||| b, c", keep_tokens_separator="|||") == "a, b, c"
    assert processed("a;b ||| c", keep_tokens_separator="|||", caption_separator=";") == "a;b;c"
    assert processed("a,  b", keep_tokens_separator="|||") == "a,  b"


def test_dropout_is_a_rate():
    dropped = sum(processed("a", seed, caption_dropout_rate=0.25) == "" for seed in range(2000))
    assert 400 < dropped < 600


def test_settings_are_not_changed_by_use():
    params = SubsetParams(token_warmup_step=0.5)
    for step in (0, 60):
        process_caption("a, b", params, rng=random.Random(0), epoch=1, step=step, max_train_steps=100)
    assert params == SubsetParams(token_warmup_step=0.5)


def test_deterministic_part():
    params = SubsetParams(
        shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=1.0, token_warmup_step=10,
        caption_dropout_rate=1.0,
        caption_dropout_every_n_epochs=1, caption_prefix="p,", caption_suffix=", s", secondary_separator=";;;",
    )
    assert deterministic_caption("{x|y}, b;;;c, d\nother", params) == "p, x, b,c, d, s"
    assert deterministic_caption("a {b}", SubsetParams()) == "a {b}"
    word = {re.compile(r"\bzyx\b"): "zyx zyx1"}
    assert deterministic_caption("zyx, zyxs", SubsetParams(), word) == "zyx zyx1, zyxs"
    assert deterministic_caption("zyx", SubsetParams(), {"": ["first", "second"]}) == "first"


def test_what_makes_a_caption_random():
    assert random_caption_settings(SubsetParams(caption_dropout_rate=0.5, caption_prefix="p", keep_tokens=1)) == []
    named = SubsetParams(
        shuffle_caption=True, enable_wildcard=True, token_warmup_step=0.1, caption_tag_dropout_rate=0.1
    )
    assert set(random_caption_settings(named)) == {
        "shuffle_caption", "enable_wildcard", "token_warmup_step", "caption_tag_dropout_rate",
    }


def test_not_utf8_names_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="a.txt.*UTF-8"):
        read_caption(str(tmp_path / "a.png"), SubsetParams(caption_extension=".txt"))


def test_empty_file_is_an_empty_caption(tmp_path):
    (tmp_path / "a.caption").write_bytes(b"")
    assert read_caption(str(tmp_path / "a.png"), SubsetParams()) == ""
    assert read_caption(str(tmp_path / "b.png"), SubsetParams()) is None


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x85", "\u2028"])
def test_only_line_ends_end_a_line(tmp_path, separator):
    (tmp_path / "a.txt").write_bytes(f"one{separator}two\r\nthree\n".encode())
    assert read_caption(str(tmp_path / "a.png"), SubsetParams(caption_extension=".txt")) == f"one{separator}two"
    wild = SubsetParams(caption_extension=".txt", enable_wildcard=True)
    assert read_caption(str(tmp_path / "a.png"), wild) == f"one{separator}two\nthree"


def test_face_numbers_count_in_the_name_alone():
    face = SubsetParams(face_crop_aug_range=(1.0, 2.0))
    assert len(caption_paths("/x_1_2_3_4/img.png", face)) == 1
    assert len(caption_paths("/x/img_1_2_3_4.png", face)) == 2
    assert len(caption_paths("/x/img_1_2_3_four.png", face)) == 1
    assert len(caption_paths("/x/img_1_2_3_4.png", SubsetParams())) == 1


def test_metadata_tags_are_not_lost():
    wild = SubsetParams(enable_wildcard=True)
    assert metadata_caption({"tags": "x, y"}, wild) == "x, y"
    assert metadata_caption({"caption": None, "tags": ["x", "y"]}, SubsetParams()) == "x,y"


def test_tag_frequency():
    def count(*texts, **settings):
        return tag_frequency((text, SubsetParams(**settings)) for text in texts)

    assert count("A, b,, a", "b ") == {"a": 1, "b": 2}
    assert count("a ||| b, c ||| d", keep_tokens_separator="|||") == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert count("a;;;b, c", secondary_separator=";;;") == {"a": 1, "b": 1, "c": 1}
    assert count("It sits, red. It rains", "it rains", caption_separator=".") == {"it sits, red": 1, "it rains": 2}
    assert count("a {red|blue} cat, {{x}}\nsky, {up, high|low}", enable_wildcard=True) == dict.fromkeys(
        ["a red cat", "a blue cat", "{x}", "sky", "up", "high", "low"], 1
    )
    assert count("a {red|blue} cat") == {"a {red|blue} cat": 1}


def test_the_space_behind_a_separator_stays():
    shuffled = {
        processed("It sits. It rains. Sun", seed, caption_separator=".", shuffle_caption=True) for seed in range(99)
    }
    assert len(shuffled) == 6 and all(sorted(text.split(". ")) == ["It rains", "It sits", "Sun"] for text in shuffled)
    assert processed("a;b;c", caption_separator=";", keep_tokens=3, shuffle_caption=True) == "a;b;c"
    assert processed("a. b ||| c", caption_separator=".", keep_tokens_separator="|||") == "a. b. c"
    assert processed("a ||| b", caption_separator=".", keep_tokens_separator="|||") == "a. b"
    both = SubsetParams(caption_separator=".", secondary_separator="||")
    for text in ("It sits||It rains. Sun", "It sits || It rains. Sun", "It sits|| It rains. Sun"):
        assert deterministic_caption(text, both) == "It sits. It rains. Sun"
    assert (
        metadata_caption({"caption": "a cat", "tags": ["x", "y"]}, SubsetParams(caption_separator=".")) == "a cat. x. y"
    )
