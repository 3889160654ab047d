"""Names of cache files and back, what folders and lists hold, captions, control files."""

from __future__ import annotations

import os

import pytest

from library.dataset.cache_io import latents_npz_path, text_npz_path
from library.dataset.cache_names import cache_base, parse_latents_name
from tests.golden_dir import behaviour_cases
from tests.golden_tests.video_architectures import ARCHITECTURES


def window_of(values: dict) -> tuple[int, ...]:
    return tuple(values[name] for name in ("start", "frames", "section") if values.get(name) is not None)


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "names"))
def test_names_of_caches(case):
    given, architecture = case["input"], ARCHITECTURES[case["input"]["architecture"]]
    base = cache_base(given["item"], window_of(given))
    assert os.path.basename(latents_npz_path(architecture, base, given["original_size"])) == case["expected"]["latents"]
    assert os.path.basename(text_npz_path(architecture, cache_base(given["item"]))) == case["expected"]["text"]


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "parse"))
def test_the_way_back(case):
    given, wanted = case["input"], case["expected"]
    ending = ARCHITECTURES[given["architecture"]].latents_suffix
    found = parse_latents_name(given["name"], ending, is_clip=given["kind"] == "video")
    assert (found.stem, list(found.original_size)) == (wanted["stem"], wanted["original_size"])
    assert found.window == window_of(wanted)
    assert parse_latents_name(given["name"], "_other.safetensors", is_clip=False) is None
