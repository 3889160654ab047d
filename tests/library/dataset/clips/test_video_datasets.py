"""Datasets of videos, from the TOML to the frames of batches: rates, windows, control clips, masks, splits, and
everything that is wrong with the files told before anything is trained."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import time
import wave
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError
from library.dataset import DatasetOptions
from library.dataset import samples as reading
from library.dataset.batch import CONDITIONING_ALPHA, CONDITIONING_IMAGES, numbered
from library.dataset.build import build_dataset_groups
from library.dataset.clips import video_files
from library.dataset.dataset import DatasetGroup
from library.dataset.datasources import ScanResult, load_datasets
from library.dataset.debug import debug_dataset, picture
from library.dataset.strategies import StrategySet
from library.families.record import ClipFacts
from library.strategy_base import LatentsCachingStrategy
from tests.library.dataset.clips.videos import SIZE, number_of, numbered_frame, write_frames, write_video
from tests.library.dataset.images import epoch_requests
from tests.toy_video.record import FAMILY

FACTS = ClipFacts(short="toy", long="toy_video", fps=12)
TOY = dataclasses.replace(FAMILY.architecture, clips=FACTS)
"""a stride of 2 frames: clips have 1, 3, 5, ... frames"""
FLAT = """
[general]
resolution = [64, 32]
caption_extension = ".txt"
batch_size = {batch_size}
[[datasets]]
video_directory = "{folder}"
{keys}
"""
NESTED = """
[[datasets]]
resolution = [64, 32]
batch_size = 2
enable_bucket = true
min_bucket_reso = 16
max_bucket_reso = 64
bucket_reso_steps = 16
[[datasets.subsets]]
video_directory = "{folder}"
caption_extension = ".txt"
{keys}
"""


def captioned(path: Path) -> Path:
    path.with_suffix(".txt").write_text(f"clip {path.stem}", encoding="utf-8")
    return path


def video(folder: Path, name: str, count: int, **how) -> Path:
    return captioned(write_video(folder / name, count, **how))


def load(
    folder: Path, keys: str, text: str = FLAT, more: str = "", architecture=TOY, batch_size: int = 2, **options
) -> tuple[DatasetGroup, DatasetGroup | None, ScanResult]:
    toml = folder.parent / "data.toml"
    toml.write_text(text.format(folder=folder.as_posix(), keys=keys, batch_size=batch_size) + more, encoding="utf-8")
    given = DatasetOptions(dataset_config=str(toml), **options)
    blueprint, scan = load_datasets(given, architecture=architecture, seed=3)
    train, validation = build_dataset_groups(blueprint, given, architecture=architecture, seed=3, scan=scan)
    return train, validation, scan


def numbers(image) -> list[int]:
    """The numbers that the frames of an image tensor [3, H, W] or [3, F, H, W] carry."""
    frames = image[:, None] if image.ndim == 3 else image
    pixels = ((frames + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()  # [F, H, W, 3]
    return [number_of(frame) for frame in pixels]


def samples(group: DatasetGroup, what: str = "images") -> dict[str, list[list[int]]]:
    """File -> the numbers that the frames of its clips carry, as an epoch has them."""
    found: dict[str, list[list[int]]] = {}
    for request in epoch_requests(group):
        batch = group.load(request)
        rows = getattr(batch, what)
        for key, row in zip(batch.image_keys, rows, strict=True):
            found.setdefault(Path(key).name, []).append(numbers(row))
    return {name: sorted(clips) for name, clips in found.items()}


def run(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


MODES = {
    "head": ('target_frames = [1, 5, 9]', [[0], run(0, 4), run(0, 8)]),
    "rounded": ('target_frames = [6, 5]', [run(0, 4)]),
    "chunk": ('target_frames = [5]\nframe_extraction = "chunk"', [run(0, 4), run(5, 9), run(10, 14)]),
    "slide": ('target_frames = [9]\nframe_extraction = "slide"\nframe_stride = 4', [run(0, 8), run(4, 12)]),
    "uniform": (
        'target_frames = [11]\nframe_extraction = "uniform"\nframe_sample = 4',
        [run(0, 10), run(1, 11), run(2, 12), run(4, 14)]
    ),
    "uniform, clips that are one": (
        'target_frames = [15]\nframe_extraction = "uniform"\nframe_sample = 4', [run(0, 14)]
    ),
    "full": ('frame_extraction = "full"', [run(0, 14)]),
    "full of a few": ('frame_extraction = "full"\nmax_frames = 10', [run(0, 8)]),
    "half the rate": ('target_frames = [7]\nsource_fps = 24', [[0, 2, 4, 6, 8, 10, 12]]),
    "8 to 12": ('target_frames = [7]\nsource_fps = 8', [[0, 0, 1, 2, 2, 3, 4]]),
    "9 to 12, by the file": ('target_frames = [9]\nsource_fps = "auto"', [[0, 0, 1, 2, 3, 3, 4, 5, 6]]),
}  # fmt: skip
"""keys -> the clips of a video of 15 frames, written down by hand"""


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_exactly_these_frames(mode, tmp_path):
    keys, expected = MODES[mode]
    video(tmp_path / "videos", "a.avi", 15, fps=9)
    write_frames(captioned(tmp_path / "videos" / "folder"), 15)
    group, _, scan = load(tmp_path / "videos", keys)
    found = samples(group)
    assert found["a.avi"] == expected
    if "auto" not in keys:  # a folder has no times
        assert found["folder"] == expected
    clips = [item for item in group.items if item.absolute_path.endswith("a.avi")]
    assert {item.caption for item in clips} == {"clip a"} and len({item.window_key for item in clips}) == len(clips)
    assert f"{len(group.items)} clip" in scan.summary and "of 2 videos found" in scan.summary


def test_a_fast_file_by_its_own_times_shows_what_is_on_the_screen(tmp_path):
    """The last frame that has begun; with a rate that is written, as known, the next one."""
    video(tmp_path / "videos", "a.avi", 12, fps=30)
    for source, expected in (('"auto"', [0, 2, 5, 7, 10]), ("30", [0, 3, 5, 8, 10])):
        group, _, _ = load(tmp_path / "videos", f"target_frames = [5]\nsource_fps = {source}")
        assert samples(group) == {"a.avi": [expected]}, source


def test_clips_of_several_lengths_and_pictures_share_a_run(tmp_path):
    """Frames are a dimension of the bucket; no batch mixes them."""
    folder = tmp_path / "videos"
    for name in "ab":
        video(folder, f"{name}.avi", 9, fps=12)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        Image.fromarray(numbered_frame(70 + i)).save(captioned(pictures / f"{i}.png"))
    more = f'[[datasets]]\nimage_directory = "{pictures.as_posix()}"\nnum_repeats = 2\n'
    group, _, scan = load(folder, "target_frames = [1, 3, 9]\nnum_repeats = 3\nenable_bucket = true", more=more)
    buckets = [(b.bucket, len(b.samples)) for dataset in group.datasets for b in dataset.buckets]
    assert buckets == [((64, 32), 6), ((64, 32, 3), 6), ((64, 32, 9), 6), ((64, 32), 4)]
    found = samples(group)
    assert found["0.png"] == [[70], [70]] and found["a.avi"] == 3 * [[0]] + 3 * [run(0, 2)] + 3 * [run(0, 8)]
    assert scan.summary == "2 images and 6 clips of 2 videos found"
    shapes = {tuple(group.load(request).images.shape[1:]) for request in epoch_requests(group)}
    assert shapes == {(3, 32, 64), (3, 3, 32, 64), (3, 9, 32, 64)}


def test_both_dialects_give_the_same_clips(tmp_path):
    video(tmp_path / "videos", "a.avi", 9, fps=12)
    keys = 'target_frames = [5]\nframe_extraction = "slide"\nframe_stride = 2'
    flat, _, _ = load(tmp_path / "videos", keys + "\nenable_bucket = true")
    nested, _, _ = load(tmp_path / "videos", keys, NESTED)
    assert samples(flat) == samples(nested) == {"a.avi": [run(0, 4), run(2, 6), run(4, 8)]}


def test_a_clip_is_mirrored_as_a_whole(tmp_path):
    video(tmp_path / "videos", "a.avi", 9, fps=12)
    keys = 'target_frames = [3]\nframe_extraction = "slide"\nflip_aug = true\nnum_repeats = 4'
    group, _, _ = load(tmp_path / "videos", keys, NESTED)
    seen = set()
    for request in epoch_requests(group):
        batch = group.load(request)
        for image, is_flipped in zip(batch.images, batch.flippeds, strict=True):
            first, *others = numbers(image.flip(-1) if is_flipped else image)
            assert others == [first + 1, first + 2]
            seen.add(is_flipped)
    assert seen == {True, False}


# ---- control clips and masks -----------------------------------------------------------------------------------------

def test_control_clips_go_with_their_windows(tmp_path):
    """Cut to the clip, or padded with their last frame; a folder of frames and another rate too."""
    folder, control = tmp_path / "videos", tmp_path / "control"
    for name in ("a", "b", "c"):
        video(folder, f"{name}.avi", 9, fps=12)
    write_video(control / "a.avi", 20, fps=12, first=100)
    write_frames(control / "b", 4, first=100)
    write_video(control / "c.mp4", 9, fps=12, first=100, size=(128, 64))
    keys = f'target_frames = [5]\nframe_extraction = "chunk"\ncontrol_directory = "{control.as_posix()}"'
    keys = keys.replace("[5]", "[3]")
    group, _, _ = load(folder, keys)
    assert samples(group) == {f"{name}.avi": [run(0, 2), run(3, 5), run(6, 8)] for name in "abc"}
    assert samples(group, "conditioning_images") == {
        "a.avi": [run(100, 102), run(103, 105), run(106, 108)],
        "b.avi": [run(100, 102), [103, 103, 103], [103, 103, 103]],
        "c.avi": [run(100, 102), run(103, 105), run(106, 108)],
    }
    assert len({item.kind.controls for item in group.items}) == 1, "of whatever size, they take that of the clip"


def test_control_clips_follow_the_conversion_of_their_own_times(tmp_path):
    folder, control = tmp_path / "videos", tmp_path / "control"
    for name in "ab":
        video(folder, f"{name}.avi", 9 if name == "a" else 18, fps=12 if name == "a" else 24)
    write_video(control / "a.avi", 18, fps=24, first=100)
    write_frames(control / "b", 8, first=100)  # no times: frame by frame those of the video
    keys = f'target_frames = [5]\nsource_fps = "auto"\ncontrol_directory = "{control.as_posix()}"'
    group, _, _ = load(folder, keys)
    assert samples(group, "conditioning_images") == {
        "a.avi": [[100, 102, 104, 106, 108]], "b.avi": [[100, 102, 104, 106, 106]]
    }


def test_missing_control_clips_are_named(tmp_path):
    for name in ("a.avi", "b.avi"):
        video(tmp_path / "videos", name, 5)
    write_video(tmp_path / "control" / "a.avi", 5)
    keys = f'target_frames = [5]\ncontrol_directory = "{(tmp_path / "control").as_posix()}"'
    with pytest.raises(ConfigError, match=r"b\.avi"):
        load(tmp_path / "videos", keys)


def test_transparency_of_frames_is_the_mask(tmp_path):
    folder = tmp_path / "videos"
    frames = write_frames(folder / "a", 3)
    for number, alpha in enumerate((255, 51, 0)):
        picture = Image.fromarray(numbered_frame(number)).convert("RGBA")
        picture.putalpha(alpha)
        picture.save(frames / f"{number:04d}.png")
    listing = tmp_path / "list.jsonl"
    listing.write_text(f'{{"video_path": "{frames.as_posix()}", "caption": "x"}}\n', encoding="utf-8")
    text = NESTED.replace('video_directory = "{folder}"', f'video_jsonl_file = "{listing.as_posix()}"')
    group, _, _ = load(folder, "target_frames = [3]\nalpha_mask = true", text)
    batch = group.load(epoch_requests(group)[0])
    assert batch.alpha_masks.shape == (1, 3, 32, 64)
    assert [round(float(mask.mean()), 4) for mask in batch.alpha_masks[0]] == [1.0, 0.2, 0.0]
    assert numbers(batch.images[0]) == [0, 1, 2]


def test_masks_of_clips_go_with_their_frames(tmp_path):
    """A video, a folder of frames, or one picture for all frames; of another size it is refused."""
    folder, masks = tmp_path / "videos", tmp_path / "masks"
    for name in "abc":
        video(folder, f"{name}.avi", 6, fps=12)
    write_video(masks / "a.mp4", 6, fps=12, first=100)
    write_frames(masks / "b", 6, first=100)
    Image.fromarray(numbered_frame(255)).save(masks / "c.png")
    (masks / "a").mkdir()
    keys = f'target_frames = [3]\nframe_extraction = "chunk"\nconditioning_data_dir = "{masks.as_posix()}"'
    group, _, scan = load(folder, keys, NESTED, masked_loss=True)
    assert samples(group, "conditioning_images") == {
        "a.avi": [run(100, 102), run(103, 105)], "b.avi": [run(100, 102), run(103, 105)], "c.avi": 2 * [[255] * 3],
    }
    assert any("have the name of another" in line for line in scan.warnings)
    Image.fromarray(numbered_frame(255, (32, 16))).save(masks / "c.png")
    with pytest.raises(ConfigError, match=r"c\.png is 32x16, its image is 64x32"):
        load(folder, keys, NESTED, masked_loss=True)
    (masks / "c.png").unlink()
    with pytest.raises(ConfigError, match=r"c\.avi has no video, folder of frames or image named c in"):
        load(folder, keys, NESTED, masked_loss=True)


def test_several_control_pictures_with_alpha(tmp_path):
    """Each in its own size, with its alpha where a family reads it; pictures with other controls share no batch."""
    folder, controls = tmp_path / "pictures", tmp_path / "controls"
    for path in (folder, controls):
        path.mkdir()
    for number in range(3):
        Image.fromarray(numbered_frame(number)).save(captioned(folder / f"{number}.png"))
        Image.fromarray(numbered_frame(100 + number, (128, 64))).save(controls / f"{number}.png")
        second = Image.fromarray(numbered_frame(200 + number, (96, 48) if number else (64, 128))).convert("RGBA")
        second.putalpha(51)
        second.save(controls / f"{number}_1.png")
    keys = f'control_directory = "{controls.as_posix()}"\nno_resize_control = true\nflip_aug = true'
    text = NESTED.replace("video_directory", "image_directory")
    architecture = dataclasses.replace(TOY, clips=dataclasses.replace(FACTS, controls=None))
    group, _, _ = load(folder, keys, text, architecture=architecture)
    assert {item.kind.controls for item in group.items} == {((128, 64), (96, 48)), ((128, 64), (64, 128))}
    group.set_strategies(StrategySet(None, None, ReadsAlpha(architecture), None))
    seen = {}
    for request in epoch_requests(group):
        batch = group.load(request)
        names = ["conditioning_images", "conditioning_alpha", "conditioning_images_1", "conditioning_alpha_1"]
        assert list(batch.conditions) == names
        alpha = batch.conditions["conditioning_alpha_1"]
        assert batch.conditions["conditioning_alpha"].min() == 1 and torch.allclose(alpha, torch.full_like(alpha, 0.2))
        for row, key in enumerate(batch.image_keys):
            seen[Path(key).name] = [tuple(batch.conditions[name][row].shape) for name in names]
            for name, first in zip(names[::2], (100, 200)):
                shown = batch.conditions[name][row]
                shown = shown.flip(-1) if batch.flippeds[row] else shown
                assert numbers(shown) == [first + int(Path(key).stem)], "mirrored with its picture"
    Image.fromarray(numbered_frame(1, (16, 8))).save(controls / "2.png")
    with pytest.raises(ConfigError, match=r"2\.png is smaller than 16x16, which toy_video needs"):
        load(folder, keys, text, architecture=architecture)
    wide = [(3, 64, 128), (1, 64, 128), (3, 48, 96), (1, 48, 96)]
    assert seen == {"0.png": [*wide[:2], (3, 128, 64), (1, 128, 64)], "1.png": wide, "2.png": wide}


class ReadsAlpha(LatentsCachingStrategy):
    """Of a family that reads all control pictures with their alpha channels."""

    def __init__(self, architecture) -> None:
        super().__init__(False, 1, False)
        self.architecture = architecture

    def encode(self, vae, images, seeds):
        raise AssertionError("nothing is encoded here")

    def pictures_for(self, bucket):
        numbers = range(len(bucket.kind.controls))
        return tuple(numbered(name, n) for n in numbers for name in (CONDITIONING_IMAGES, CONDITIONING_ALPHA))


def test_transparency_that_is_not_read_is_told(tmp_path, monkeypatch):
    """It is a mask that would be lost; without alpha_mask it is dropped, as that of pictures."""
    video(tmp_path / "videos", "a.avi", 5, fps=12)
    look = video_files.look_at_video
    seen = {"transparent": True, "reads_alpha": False}
    monkeypatch.setattr(video_files, "look_at_video", lambda path: dataclasses.replace(look(path), **seen))
    with pytest.raises(ConfigError, match=r"a\.avi has transparency, which alpha_mask needs and OpenCV does not read"):
        load(tmp_path / "videos", "target_frames = [3]\nalpha_mask = true", NESTED)
    _, _, scan = load(tmp_path / "videos", "target_frames = [3]", NESTED)
    assert any("videos in datasets[0].subsets[0] have transparency, which is dropped" in line for line in scan.warnings)


# ---- held-out videos and regularisation ------------------------------------------------------------------------------

def test_clips_of_a_video_are_on_one_side_of_the_split(tmp_path):
    for number in range(8):
        video(tmp_path / "videos", f"{number}.avi", 9, fps=12)
    keys = 'target_frames = [3]\nframe_extraction = "chunk"\nvalidation_split = 0.25'
    train, validation, _ = load(tmp_path / "videos", keys, NESTED)
    learned, held = ({item.absolute_path for item in group.items} for group in (train, validation))
    assert len(learned) == 6 and len(held) == 2 and not learned & held
    assert len(train.items) == 18 and len(validation.items) == 6


def test_videos_of_regularisation_are_balanced(tmp_path):
    video(tmp_path / "videos", "a.avi", 9, fps=12)
    video(tmp_path / "reg", "r.avi", 5, fps=12)
    more = f'[[datasets.subsets]]\nvideo_directory = "{(tmp_path / "reg").as_posix()}"\nis_reg = true\n'
    more += 'caption_extension = ".txt"\ntarget_frames = [5]\n'
    keys = 'target_frames = [5]\nframe_extraction = "slide"'
    group, _, _ = load(tmp_path / "videos", keys, NESTED, more)
    assert len(group.datasets[0].buckets[0].samples) == 10, "five clips, and one of regularisation five times"


# ---- what is wrong with files ----------------------------------------------------------------------------------------

def test_all_bad_files_are_told_at_once(tmp_path):
    folder = tmp_path / "videos"
    video(folder, "good.avi", 9, fps=12)
    bad = {"empty.mp4": b"", "text.avi": b"no video at all", "sound.mkv": wave_bytes()}
    whole = video(folder, "half.mp4", 9).read_bytes()
    bad["half.mp4"] = whole[: len(whole) // 2]
    frames = video(folder, "head.avi", 9).read_bytes()
    bad["head.avi"] = frames[: frames.index(b"movi") + 8]  # all of the header, and no frame
    for name, content in bad.items():
        captioned(folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(folder, "target_frames = [5]")
    assert len(error.value.problems) == len(bad)
    for name in bad:
        assert any(name in problem for problem in error.value.problems), name
    told = "\n".join(error.value.problems)
    assert "empty.mp4 is an empty file" in told
    assert "head.avi has a video stream of which no frame can be decoded" in told
    group, _, scan = load(folder, "target_frames = [5]", skip_bad_images=True)
    assert samples(group) == {"good.avi": [run(0, 4)]} and scan.num_skipped == len(bad)


def wave_bytes() -> bytes:
    """A file of sound."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(16000))
    return buffer.getvalue()


def test_short_videos_are_counted_and_named(tmp_path):
    for name, count in (("a.avi", 9), ("b.avi", 4), ("c.avi", 2)):
        video(tmp_path / "videos", name, count, fps=12)
    _, _, scan = load(tmp_path / "videos", "target_frames = [5, 9]")
    (told,) = [line for line in scan.warnings if "shorter" in line]
    assert "2 of 3 videos" in told and "b.avi (4 frames)" in told and "c.avi (2 frames)" in told and "5 frames" in told
    _, _, scan = load(tmp_path / "videos", "target_frames = [5, 17, 13]")
    assert [line for line in scan.warnings if "no clip has the length 13, 17 of target_frames" in line]
    with pytest.raises(ConfigError, match=r"3 of 3 videos are shorter than the shortest clip, which has 11 frames"):
        load(tmp_path / "videos", "target_frames = [11]")
    with pytest.raises(ConfigError, match=r"a\.avi \(5 frames of 9 after the conversion\)"):
        load(tmp_path / "videos", "target_frames = [9]\nsource_fps = 24")


NOTICES = {
    "other rate": ("", r"1 video has another frame rate than the 12 fps of toy_video.*a\.avi \(24 fps\).*\"auto\""),
    "file says otherwise": ("source_fps = 12", r"source_fps is 12, and 1 video says otherwise: .*a\.avi \(24 fps\)"),
    "slower than trained": ("source_fps = 10", r"says otherwise"),
    "right": ("source_fps = 24", None),
    "auto": ('source_fps = "auto"', None),
}


@pytest.mark.parametrize("case", NOTICES)
def test_rates_that_do_not_fit_are_mentioned(case, tmp_path):
    keys, expected = NOTICES[case]
    video(tmp_path / "videos", "a.avi", 40, fps=24)
    _, _, scan = load(tmp_path / "videos", f"target_frames = [5]\n{keys}")
    told = " ".join(line for line in scan.warnings if "fps" in line)
    assert bool(told) == bool(expected) and (expected is None or re.search(expected, told)), told


def test_frames_of_several_sizes_are_mentioned_and_cover_the_bucket(tmp_path):
    folder = tmp_path / "videos"
    write_frames(folder / "a", 4, sizes=[SIZE, (64, 64)])
    second = Image.open(folder / "a" / "0001.png")
    second.paste((255, 0, 0), (0, 0, 64, 8))  # in the part that is cut away
    second.save(folder / "a" / "0001.png")
    listing = tmp_path / "list.jsonl"
    listing.write_text(f'{{"video_path": "{(folder / "a").as_posix()}", "caption": "x"}}\n', encoding="utf-8")
    text = NESTED.replace('video_directory = "{folder}"', f'video_jsonl_file = "{listing.as_posix()}"')
    group, _, scan = load(folder, "target_frames = [3]", text)
    assert any("several sizes" in line for line in scan.warnings)
    (clip,) = group.load(epoch_requests(group)[0]).images
    assert numbers(clip) == [0, 1, 2] and not (clip[0] > clip[1] + 0.5).any(), "no red"


def test_a_file_that_breaks_off_later_is_named_when_it_is_read(tmp_path):
    path = video(tmp_path / "videos", "a.avi", 40, fps=12)
    group, _, _ = load(tmp_path / "videos", "target_frames = [39]")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"a\.avi has no frame \d+, or it cannot be decoded.*--skip_bad_images"):
        samples(group)


def test_a_file_that_broke_off_is_used_as_far_as_it_goes(tmp_path):
    path = video(tmp_path / "videos", "a.avi", 40, fps=12)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    group, _, scan = load(tmp_path / "videos", "target_frames = [5]")
    (told,) = [line for line in scan.warnings if "break off" in line]
    assert re.search(r"a\.avi \(\d+ of 40 frames\)", told)
    assert samples(group) == {"a.avi": [run(0, 4)]}


# ---- what a second start reads, and memory ---------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["index", "cache_info"])
def test_a_second_start_opens_no_video(how, tmp_path, monkeypatch):
    video(tmp_path / "videos", "a.avi", 15, fps=9)
    for name in ("a.avi", "a.txt"):
        _age(tmp_path / "videos" / name)
    keys, text = 'target_frames = [5]\nsource_fps = "auto"', FLAT
    if how == "cache_info":
        keys, text = keys + "\ncache_info = true", NESTED
    first, _, scan = load(tmp_path / "videos", keys, text)
    if how == "index":
        scan.index.save()
    with monkeypatch.context() as patch:
        patch.setattr(video_files, "look_at_video", lambda *_: pytest.fail("opened"))
        again, _, _ = load(tmp_path / "videos", keys, text)
    assert [(item.clip, item.image_size) for item in again.items] == [
        (item.clip, item.image_size) for item in first.items
    ]
    video(tmp_path / "videos", "a.avi", 4, fps=9)
    with pytest.raises(ConfigError, match="shorter"):
        load(tmp_path / "videos", keys.replace("[5]", "[9]"), text)


def _age(path: Path) -> None:
    """A file changed just now may change again within the resolution of the clock: an index waits for a second."""
    os.utime(path, ns=(time.time_ns() - 10**10,) * 2)


def test_no_more_frames_than_the_clip_are_in_memory(tmp_path, monkeypatch):
    """Large frames are resized one by one."""
    folder = tmp_path / "videos"
    video(folder, "a.avi", 30, fps=12, size=(256, 128))
    keys = 'target_frames = [5]\nframe_extraction = "uniform"\nframe_sample = 2'
    group, _, _ = load(folder, keys, batch_size=1)
    live, most = [], []

    def counted(path, wanted, **how):
        for frame in video_files.frames_of(path, wanted, **how):
            live[:] = [one for one in live if one() is not None]
            live.append(weakref.ref(frame))
            most.append(len(live))
            yield frame
            del frame

    monkeypatch.setattr(reading, "frames_of", counted)
    assert samples(group) == {"a.avi": [run(0, 4), run(25, 29)]}
    assert max(most) <= 3 and len(most) == 10


def test_nothing_is_said_of_videos_that_fit(tmp_path):
    for name in ("a.avi", "b.avi"):
        video(tmp_path / "videos", name, 9, fps=12)
    _, _, scan = load(tmp_path / "videos", 'target_frames = [3]\nframe_extraction = "chunk"')
    assert scan.summary == "6 clips of 2 videos found" and not scan.warnings


def test_debug_dataset_shows_frames_of_clips(tmp_path):
    video(tmp_path / "videos", "a.avi", 9, fps=12)
    group, _, _ = load(tmp_path / "videos", 'target_frames = [7]\nframe_extraction = "slide"\nframe_stride = 2')
    lines: list[str] = []
    assert debug_dataset(group, seed=3, sheet=tmp_path / "sheet.png", show=lines.append) == 2
    text = "\n".join(lines)
    assert "images 2 of 64x32x7" in text and "a.avi, frames 2 to 8: 64x32 to 64x32" in text
    (strip,) = [picture(image) for image in group.load(epoch_requests(group)[0]).images[:1]]
    frames = np.split(np.asarray(strip), 4, axis=1)
    first = number_of(frames[0])
    assert strip.size == (256, 32) and [number_of(frame) - first for frame in frames] == [0, 2, 4, 6]
