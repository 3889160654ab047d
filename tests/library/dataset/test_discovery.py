"""What folders and lists of videos, frames and control files hold; nothing is opened."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.dataset.clips.settings import ClipSettings
from library.dataset.clips.windows import ClipWindow, ControlClip
from library.dataset.control_files import control_pictures, control_videos, layers
from library.dataset.discovery import discover
from library.dataset.items import SubsetParams
from library.dataset.jsonl_lists import read_list
from library.dataset.scanner import FoundImage, Scanner
from tests.golden_dir import behaviour_cases


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


def scan(fails: bool = False, **settings) -> tuple[list[FoundImage], Scanner]:
    scanner = Scanner(False, fails, False)
    return discover(SubsetParams(label="datasets[0]", **settings), "DB", scanner), scanner


def videos(folder: Path, **settings) -> tuple[list[FoundImage], Scanner]:
    settings = {"caption_extension": ".txt", "clips": ClipSettings(), **settings}
    return scan(video_directory=str(folder), **settings)


def names(images: list[FoundImage]) -> list[str]:
    return [os.path.basename(image.path) for image in images]


def test_a_folder_of_frames_is_a_video_when_it_has_a_caption(tmp_path):
    touch(tmp_path, "walk/1.png", "walk.txt", "run/1.png", "b.mp4", "v1.2/1.png", "v1.txt")
    assert names(videos(tmp_path)[0]) == ["b.mp4", "v1.2", "walk"]
    assert names(videos(tmp_path, caption_extension=None, whole_captions=True)[0]) == ["b.mp4"]


def test_files_with_an_extension_of_both_cases_are_named_without_subsets(tmp_path):
    touch(tmp_path, "a.mp4", "b.MP4", "c.Mp4")
    found, scanner = videos(tmp_path, whole_captions=True)
    assert names(found) == ["a.mp4", "b.MP4"]
    told = "1 files in datasets[0] have an extension of small and capital letters and are left out: c.Mp4"
    assert scanner.warnings == [told]
    found, scanner = videos(tmp_path)
    assert names(found) == ["a.mp4", "b.MP4", "c.Mp4"] and not scanner.warnings


def test_pictures_without_a_caption_stay_where_something_stands_for_it(tmp_path):
    touch(tmp_path, "a.png", "a.txt", "b.png")
    whole = {"image_dir": str(tmp_path), "caption_extension": ".txt", "whole_captions": True}
    found, scanner = scan(**whole)
    assert names(found) == ["a.png"] and scanner.skipped == {str(tmp_path / "b.png")}
    assert names(scan(**whole, class_tokens="a cat")[0]) == names(scan(True, **whole)[0]) == ["a.png", "b.png"]
    assert names(scan(**{**whole, "whole_captions": False})[0]) == ["a.png", "b.png"]


def test_controls_are_files_of_the_control_folder(tmp_path):
    touch(tmp_path, "v/a.mp4", "v/b.mp4", "c/a.mp4", "c/b/0.png", "c/zz.txt")
    found, scanner = videos(tmp_path / "v", control_directory=str(tmp_path / "c"))
    assert [image.control_paths for image in found] == [(str(tmp_path / "c" / "a.mp4"),), (str(tmp_path / "c" / "b"),)]
    assert not scanner.problems
    assert {image.control_paths for image in videos(tmp_path / "v", control_directory="c", control_count=0)[0]} == {()}
    touch(tmp_path, "i/a.png", "k/a_1.png", "k/a_0.png", "k/a_2.txt")
    [image], _ = scan(image_dir=str(tmp_path / "i"), control_directory=str(tmp_path / "k"), control_count=None)
    assert image.control_paths == (str(tmp_path / "k" / "a_0.png"), str(tmp_path / "k" / "a_1.png"))


def test_what_lacks_controls_is_named(tmp_path):
    touch(tmp_path, *(f"v/{i}.mp4" for i in range(7)), "c/0.mp4")
    _, scanner = videos(tmp_path / "v", control_directory=str(tmp_path / "c"))
    assert scanner.problems == [
        "datasets[0]: 6 videos lack a control video or folder of frames: 1.mp4, 2.mp4, 3.mp4, 4.mp4, 5.mp4 and 1 more"
    ]
    _, scanner = videos(tmp_path / "v", control_directory=str(tmp_path / "none"))
    assert scanner.problems == [f"datasets[0]: the folder {tmp_path / 'none'} does not exist"]
    with pytest.raises(ConfigError) as caught:
        control_pictures(["a.png", "b.png"], ["a_left.png", "a_0.png"], 2)
    assert list(caught.value.problems) == [
        "1 names have no number behind the name of their picture, as a_0.png has: a_left.png",
        "2 pictures lack 2 control pictures each: a.png (1 there), b.png",
    ]


def test_a_word_may_stand_before_the_number():
    files = ["a_pose_1.png", "a_depth_0.png", "a.b_2.png"]
    assert control_pictures(["a.png"], files, None) == {"a.png": ("a_depth_0.png", "a_pose_1.png", "a.b_2.png")}


def test_pictures_of_one_name_share_their_controls():
    assert control_pictures(["a.jpg", "a.png"], ["a.png"], 1) == {"a.jpg": ("a.png",), "a.png": ("a.png",)}


def test_the_folder_of_a_video_of_frames_has_its_control_by_name():
    assert control_videos(["walk"], {"walk.mp4"}, {"walk"}, (".mp4",)) == {"walk": "walk"}
    assert control_videos(["walk"], {"walk.MP4"}, set(), (".mp4",)) == {"walk": "walk.MP4"}


def test_layers_of_a_folder(tmp_path):
    touch(tmp_path, "a.png", "a.txt", "a_0.png", "a_1.png", "b.png", "b.txt", "b_0.png", "b_1.png", "z.png")
    [one, two], scanner = scan(
        image_dir=str(tmp_path), caption_extension=".txt", whole_captions=True, multiple_target=True
    )
    assert names([one, two]) == ["a.png", "b.png"] and scanner.warnings[0].endswith("left out: z.png")
    assert [os.path.basename(path) for path in two.target_paths] == ["b_0.png", "b_1.png"]
    with pytest.raises(ConfigError, match="equally many layers of each picture: a.png has 1, b.png has 0"):
        layers(["a.png", "a_0.png", "b.png"], {"a", "b"})


def write_list(path: Path, *rows: dict | str) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_a_list_keeps_its_order_and_its_captions(tmp_path):
    rows = [{"video_path": "b.mp4", "caption": " two\nlines "}, {"video_path": "a"}]
    found, scanner = scan(video_jsonl_file=write_list(tmp_path / "x.jsonl", *rows), clips=ClipSettings())
    assert [(image.path, image.caption) for image in found] == [("b.mp4", " two\nlines "), ("a", None)]
    assert not scanner.problems


def test_every_fault_of_a_list_is_told(tmp_path):
    path = write_list(
        tmp_path / "x.jsonl", {"image_path": "a.png"}, "{", "", "[]", {"video_path": 5},
        {"video_path": "", "caption": ""}, {"video_path": "v", "caption": 1}, {"caption": "x"},
        {"video_path": "v", "control_path_0": None},
    )
    with pytest.raises(ConfigError) as caught:
        read_list(path, "video")
    told = [problem.removeprefix(path) for problem in caught.value.problems]
    assert [line.partition(" ")[0].rstrip(":") for line in told] == [f":{n}" for n in (1, 2, 4, 5, 6, 7, 8, 9)]
    assert told[0] == ":1 has no video_path; image_path is for a list of images"
    assert told[4] == ":6: video_path is ''; a path is needed" and told[5] == ":7: caption is 1; a text is needed"


def test_control_files_of_a_list_exist(tmp_path):
    touch(tmp_path, "k.png")
    rows = [{"image_path": "a.png", "caption": "", "control_path": str(tmp_path / name)} for name in ("k.png", "l.png")]
    path = write_list(tmp_path / "x.jsonl", *rows)
    _, scanner = scan(image_jsonl_file=path)
    assert scanner.problems == [f"datasets[0]: {path} names control files that do not exist: {tmp_path / 'l.png'}"]
    assert not scan(image_jsonl_file=path, control_count=0)[1].problems


def test_layers_of_a_list_are_equally_many(tmp_path):
    rows = [{"image_path_0": "a.png", "image_path_1": "b.png"}, {"image_path_0": "c.png", "image_path_10": "d.png"}]
    path = write_list(tmp_path / "x.jsonl", *rows)
    found, scanner = scan(image_jsonl_file=path, multiple_target=True)
    assert [image.target_paths for image in found] == [("b.png",), ("d.png",)] and not scanner.problems
    assert scan(image_jsonl_file=path)[0][0].target_paths == ()
    uneven = write_list(tmp_path / "y.jsonl", *rows, {"image_path": "e.png"})
    assert "equally many layers" in scan(image_jsonl_file=uneven, multiple_target=True)[1].problems[0]


@pytest.mark.parametrize("case", behaviour_cases("video_names.json", "control_length"))
def test_a_control_is_as_long_as_its_video(case):
    given = case["input"]
    indices = ControlClip(given["control_frames"]).frame_numbers(ClipWindow(0, given["video_frames"]))
    assert indices == case["expected"]["control_indices"]


def test_ten_thousand_files_take_no_time():
    """A file is looked for in a set: twice as many take about twice as long, not four times."""
    count = 10_000
    pictures = [f"picture_{i}_x.png" for i in range(count)]
    controls = [f"picture_{i}_x_{n}.png" for i in range(count) for n in (0, 1)]
    videos = [f"clip_{i}.mp4" for i in range(count)]
    start = time.process_time()
    assert len(control_pictures(pictures, controls, 2)) == count
    assert len(layers([*pictures, *controls], {name.removesuffix(".png") for name in pictures})) == count
    assert len(control_videos(videos, {f"clip_{i}.avi" for i in range(count)}, set(), (".mp4", ".avi"))) == count
    assert time.process_time() - start < 5
