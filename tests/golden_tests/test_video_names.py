"""Names of cache files and back, what folders and lists hold, captions, control files."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.dataset.architectures import ARCHITECTURES as FAMILIES
from library.dataset.cache_checks import cache_paths
from library.dataset.cache_io import latents_npz_path, text_npz_path
from library.dataset.cache_names import cache_base, latents_base, parse_latents_name
from library.dataset.captions import read_caption
from library.dataset.clips.frame_folders import frame_files
from library.dataset.clips.settings import ClipSettings
from library.dataset.clips.video_files import VIDEO_EXTENSIONS
from library.dataset.control_files import control_pictures, control_videos, layers
from library.dataset.discovery import discover
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.jsonl_lists import read_list
from library.dataset.scanner import FoundImage, Scanner
from tests.golden_dir import behaviour, behaviour_cases
from tests.golden_tests.video_architectures import ARCHITECTURES


def window_of(values: dict) -> tuple[int, ...]:
    return tuple(values[name] for name in ("start", "frames", "section") if values.get(name) is not None)


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "names"))
def test_names_of_caches(case):
    given, architecture = case["input"], ARCHITECTURES[case["input"]["architecture"]]
    base = cache_base(given["item"], window_of(given))
    assert os.path.basename(latents_npz_path(architecture, base, given["original_size"])) == case["expected"]["latents"]
    assert os.path.basename(text_npz_path(architecture, cache_base(given["item"]))) == case["expected"]["text"]


def test_a_folder_of_caches(tmp_path):
    assert cache_base("v/a.b.mp4", (5, 9), str(tmp_path)) == str(tmp_path / "a.b_00005-009.mp4")
    assert cache_base("v/walk", (5, 9, 2)) == "v/walk_00005-009-0002"


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "parse"))
def test_the_way_back(case):
    given, wanted = case["input"], case["expected"]
    ending = ARCHITECTURES[given["architecture"]].latents_suffix
    found = parse_latents_name(given["name"], ending, is_clip=given["kind"] == "video")
    assert (found.stem, list(found.original_size)) == (wanted["stem"], wanted["original_size"])
    assert found.window == window_of(wanted)
    assert parse_latents_name(given["name"], "_other.safetensors", is_clip=False) is None


def touch(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found_in(subset: SubsetParams) -> tuple[list[FoundImage], Scanner]:
    scanner = Scanner(False, False, False)
    return discover(subset, "DB", scanner), scanner


def folder_subset(folder: Path, kind: str, **settings) -> SubsetParams:
    videos = {"video_directory": str(folder), "clips": ClipSettings()}
    source = {"image_dir": str(folder)} if kind == "image" else videos
    return SubsetParams(whole_captions=True, label="datasets[0]", **source, **settings)


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "discovery"))
def test_what_a_folder_holds(case, tmp_path):
    given, wanted = case["input"], case["expected"]
    touch(tmp_path, given["files"])
    images, scanner = found_in(folder_subset(tmp_path, given["kind"], caption_extension=given["caption_extension"]))
    assert [os.path.basename(image.path) for image in images] == wanted["items"]
    left_out = wanted.get("left_out_and_reported", [])
    told = [line for line in scanner.warnings if "no caption file" in line]
    assert len(told) == bool(left_out) and not scanner.problems
    assert all(name in told[0] and told[0].startswith(str(len(left_out))) for name in left_out)


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "frame_folders"))
def test_the_order_of_frames(case, tmp_path):
    touch(tmp_path, case["input"]["files"])
    assert [os.path.basename(path) for path in frame_files(str(tmp_path))] == case["expected"]["order"]


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "captions"))
def test_captions(case, tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes.fromhex(case["input"]["file_bytes_hex"]))
    subset = folder_subset(tmp_path, "image", caption_extension=".txt")
    assert read_caption(str(tmp_path / "a.png"), subset) == case["expected"]["caption"]


def test_the_number_of_control_pictures():
    for name, wanted in behaviour("video_names.json")["controls_per_image"].items():
        facts = ARCHITECTURES[name].clips
        by_indices = isinstance(wanted, str)
        assert facts.one_frame == by_indices and facts.controls == (1 if by_indices else wanted), name


@pytest.mark.parametrize("name", ["hunyuan_video", "wan", "framepack"])
def test_the_records_of_families_say_the_same(name):
    own = FAMILIES[name]
    known = ARCHITECTURES[own.clips.short]
    assert own.clips == dataclasses.replace(known.clips, long=own.clips.long)
    assert (own.bucket_step, own.latents_suffix, own.text_suffix) == (
        known.bucket_step, known.latents_suffix, known.text_suffix
    )


def assert_found(find, wanted) -> None:
    if wanted == "error":
        with pytest.raises(ConfigError):
            find()
    else:
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in find().items()}
        assert found == wanted


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "controls"))
def test_control_pictures(case):
    given = case["input"]
    count = given["controls_per_image"]
    assert_found(lambda: control_pictures(given["images"], given["control_files"], count), case["expected"])


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "video_controls"))
def test_control_videos(case):
    given = case["input"]
    folders = {name.partition("/")[0] for name in given["control_files"] if "/" in name}
    files = {name for name in given["control_files"] if "/" not in name}
    assert_found(lambda: control_videos(given["videos"], files, folders, VIDEO_EXTENSIONS), case["expected"])


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "multiple_target"))
def test_layers(case):
    assert_found(lambda: layers(case["input"]["files"], case["input"]["captioned"]), case["expected"])


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "jsonl"))
def test_lists(case, tmp_path):
    given, wanted = case["input"], case["expected"]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, given["rows"])), encoding="utf-8")
    if wanted == "error":
        with pytest.raises(ConfigError):
            read_list(str(path), given["kind"], given["controls_per_image"])
        return
    entries = read_list(str(path), given["kind"], given["controls_per_image"])
    found = [{"item": one.path, "caption": one.caption, "controls": list(one.controls)} for one in entries]
    assert found == wanted


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "collisions"))
def test_no_two_files_share_a_cache(case, tmp_path):
    """Refused when they are listed, or two names."""
    touch(tmp_path, case["input"]["items"])
    path = tmp_path / "list.jsonl"
    rows = [{"image_path": str(tmp_path / name), "caption": "x"} for name in case["input"]["items"]]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    subset = SubsetParams(image_jsonl_file=str(path), cache_directory=str(tmp_path / "c"), label="datasets[0]")
    images, scanner = found_in(subset)
    items = [ImageItem(image.path, image.path, "x", subset, (64, 64)) for image in images]
    if any("would share a file" in problem for problem in scanner.problems):
        return

    def path_of(item: ImageItem, path: str) -> str:
        return latents_npz_path(ARCHITECTURES["hv"], latents_base(item, path), (64, 64))

    names = cache_paths(items, path_of)
    assert len(set(names)) == len(items)
