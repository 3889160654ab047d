"""Captions in JSON: order, what is shuffled and dropped, files, caches."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.dataset import json_captions
from library.dataset.captions import (
    caption_paths,
    deterministic_caption,
    process_caption,
    random_caption_settings,
    read_caption,
    tag_frequency,
)
from library.dataset.info_cache import info_entry, known_image
from library.dataset.items import SubsetParams

FULL = {
    "nl": "A zorbit, in\na wood.", "environment": ["wood", "night"], "tags": "hat, smile,, hat ,1girl",
    "appearance": ["blue eyes", "long hair", "big ears"], "artist": None, "series": "",
    "character": ["zorbit"], "count": "1girl", "quality": "masterpiece, best", "trigger": "zrb",
}  # fmt: skip
HEAD, TAIL = "zrb, masterpiece, best, 1girl, zorbit", ". A zorbit, in a wood."


def used(caption: str, seed: int = 0, step: int = 0, **settings) -> str:
    params = SubsetParams(prefer_json=True, **settings)
    return process_caption(caption, params, rng=random.Random(seed), epoch=1, step=step, max_train_steps=100)


@pytest.fixture
def caption(tmp_path) -> str:
    (tmp_path / "a.json").write_text(json.dumps(FULL), encoding="utf-8-sig")
    return read_caption(str(tmp_path / "a.png"), SubsetParams(prefer_json=True))


def test_categories_have_one_order_and_a_tag_one_place(caption):
    text = f"{HEAD}, blue eyes, long hair, big ears, hat, smile, wood, night{TAIL}"
    params = SubsetParams(prefer_json=True, shuffle_caption=True, caption_tag_dropout_rate=0.9, token_warmup_step=9)
    assert used(caption) == deterministic_caption(caption, params) == text
    assert used(caption, caption_prefix="p,", caption_suffix="s", keep_tokens=3) == f"p, {text} s"
    assert used(caption, caption_separator=";").startswith("zrb; masterpiece; best; 1girl")
    assert used('{"nl": "Only this."}') == "Only this." and used('{"tags": "a,b"}') == "a, b"
    assert set(random_caption_settings(params)) == {"shuffle_caption", "token_warmup_step", "caption_tag_dropout_rate"}


def test_shuffling_stays_within_appearance_tags_and_environment(caption):
    parts = [("blue eyes", "long hair", "big ears"), ("hat", "smile"), ("wood", "night")]
    seen = [set(), set(), set()]
    for seed in range(60):
        text = used(caption, seed, shuffle_caption=True)
        assert text.startswith(HEAD + ", ") and text.endswith(TAIL)
        tags = text.removeprefix(HEAD + ", ").removesuffix(TAIL).split(", ")
        for place, found in enumerate((tags[:3], tags[3:5], tags[5:])):
            assert sorted(found) == sorted(parts[place])
            seen[place].add(tuple(found))
    assert [len(orders) for orders in seen] == [6, 2, 2]


def test_tags_are_dropped_at_the_rate_and_one_stays(caption):
    counts = []
    for seed in range(400):
        text = used(caption, seed, caption_tag_dropout_rate=0.3)
        assert text.startswith(HEAD) and text.endswith(TAIL)
        counts.append(text.removesuffix(TAIL).count(", ") - HEAD.count(", "))
    assert sum(counts) / len(counts) == pytest.approx(0.7 * 7, rel=0.05)
    last = {used(caption, seed, caption_tag_dropout_rate=1.0).removeprefix(HEAD + ", ") for seed in range(100)}
    assert len(last) == 7, "any of them"


def test_the_warm_up_adds_free_tags_and_wildcards_work(caption):
    assert used(caption, step=0, token_warmup_step=14) == f"{HEAD}, blue eyes{TAIL}"
    assert used(caption, step=7, token_warmup_step=14) == f"{HEAD}, blue eyes, long hair, big ears, hat{TAIL}"
    found = {used('{"tags": ["{red|green} hat"]}', seed, enable_wildcard=True) for seed in range(20)}
    assert found == {"red hat", "green hat"}


def test_where_captions_lie(tmp_path):
    picture = str(tmp_path / "a.png")
    both, only = SubsetParams(prefer_json=True, caption_extension=".txt"), SubsetParams(caption_extension=".json")
    assert [Path(path).suffix for path in caption_paths(picture, both)] == [".json", ".txt"]
    (tmp_path / "a.txt").write_text("{red|green} hat, dog", encoding="utf-8")
    assert read_caption(picture, both) == "{red|green} hat, dog" and read_caption(picture, only) is None
    assert used("{red|green} hat, dog") == "{red|green} hat, dog", "a text beside JSON files stays one"
    (tmp_path / "a.json").write_text('{"tags": "cat"}', encoding="utf-8")
    assert read_caption(picture, both) == read_caption(picture, only) == '{"tags": "cat"}'
    assert read_caption(picture, SubsetParams(caption_extension=".txt")) == "{red|green} hat, dog"
    assert process_caption(
        '{"tags": "cat"}', only, rng=random.Random(0), epoch=1, step=0, max_train_steps=1
    ) == "cat"  # fmt: skip
    (tmp_path / "a.json").write_text('{"tags": [], "nl": " "}', encoding="utf-8")
    assert read_caption(picture, both) == "", "told as an empty caption"


@pytest.mark.parametrize("text, told", [
    ("{", "a.json"), ("[1]", "is no caption; needed: an object"), ('{"tags": {"a": 1}}', "has the entry tags"),
    ('{"tags": "a", "tags": "b"}', "the key 'tags' is there twice"),
    ('{"nl": true}', "has the entry nl true; needed: a text or a list of texts"),
])  # fmt: skip
def test_what_is_no_caption_is_an_error(tmp_path, text, told):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=told) as error:
        read_caption(str(tmp_path / "a.png"), SubsetParams(prefer_json=True))
    assert "a.json" in str(error.value)


def test_an_unknown_entry_is_told_once(caplog):
    json_captions._warn_of_entry.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in ("a.json", "b.json"):
            assert json_captions.caption_of_json('{"tag": "x", "tags": "y"}', name) == '{"tags": "y"}'
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "captions in JSON: the entry 'tag' is not read; did you mean 'tags'?"
    ]


def test_tags_are_counted_without_the_text(caption):
    counts = tag_frequency([(caption, SubsetParams(prefer_json=True))])
    assert counts == dict.fromkeys(
        [*HEAD.split(", "), "blue eyes", "long hair", "big ears", "hat", "smile", "wood", "night"], 1
    )


def test_an_entry_of_the_info_cache_is_of_one_way_to_read(tmp_path):
    for name in ("a.png", "a.json"):
        (tmp_path / name).write_text('{"tags": "x"}')
    picture = str(tmp_path / "a.png")
    for params in (SubsetParams(prefer_json=True), SubsetParams(caption_extension=".json")):
        entries = {"a.png": info_entry(picture, (8, 8), '{"tags": "x"}', params)}
        assert known_image(entries, picture, params).caption == '{"tags": "x"}'
        assert known_image(entries, picture, SubsetParams(caption_extension=".txt")) is None
        (tmp_path / "a.json").write_text('{"tags": "other"}')
        assert known_image(entries, picture, params) is None
