"""Captions: processing for a sample, reading of caption files, metadata entries."""

from __future__ import annotations

import random

import pytest

from library.dataset.captions import metadata_caption, process_caption, read_caption
from library.dataset.items import SubsetParams
from tests.golden_dir import behaviour_cases

FEWEST_DRAWS, MOST_DRAWS = 300, 50_000  # until every wanted result was seen


def of_kind(kind: str):
    return behaviour_cases("captions.json", where=lambda case: case["input"]["kind"] == kind)


@pytest.mark.parametrize("case", of_kind("process"))
def test_process(case):
    given, expected = case["input"], case["expected"]
    params = SubsetParams(**given["settings"])
    wanted = set(expected["any_of"]) if "any_of" in expected else {expected["caption"]}
    results: set[str] = set()
    for seed in range(MOST_DRAWS):
        results.add(process_caption(
            given["caption"], params, rng=random.Random(seed), epoch=given.get("epoch", 1), step=given.get("step", 0),
            max_train_steps=given.get("max_train_steps", 100), replacements=given.get("replacements"),
        ))
        if not results <= wanted or seed >= FEWEST_DRAWS and results == wanted:
            break
    assert results == wanted


@pytest.mark.parametrize("case", of_kind("file"))
def test_file(case, tmp_path):
    given = case["input"]
    for name, text in given["files"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("utf-8"))
    params = SubsetParams(**given["settings"])
    caption = read_caption(str(tmp_path / given["image"]), params)
    assert (params.class_tokens or "" if caption is None else caption) == case["expected"]["caption"]


@pytest.mark.parametrize("case", of_kind("metadata"))
def test_metadata(case):
    assert (
        metadata_caption(case["input"]["entry"], SubsetParams(**case["input"]["settings"]))
        == case["expected"]["caption"]
    )
