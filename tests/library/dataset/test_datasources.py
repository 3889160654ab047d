"""The scan of real folders: what is found, what is refused, what is skipped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.core.errors import ConfigError
from library.dataset import DatasetOptions
from library.dataset.architectures import ARCHITECTURES
from library.dataset.datasources import ScanResult, load_datasets
from library.dataset.info_cache import FILE_NAME
from library.dataset.text_caching import cached_caption


def image(path: Path, size=(32, 16), caption: str | None = "a cat", mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(1, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def config(*subsets: str, head: str = "resolution = 64", rest: str = "") -> str:
    return f"[general]\n{rest}\n[[datasets]]\n{head}\n" + "".join(
        f"[[datasets.subsets]]\n{subset}\n" for subset in subsets
    )


def scan(
    tmp_path: Path, text: str, *, seed: int | None = None, check_images: bool | None = None, **options
) -> ScanResult:
    path = tmp_path / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    given = DatasetOptions(dataset_config=path, caption_extension=".txt", **options)
    return load_datasets(given, architecture=ARCHITECTURES["flux"], seed=seed, check_images=check_images)[1]


def problems(tmp_path: Path, text: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        scan(tmp_path, text, **options)
    return list(caught.value.problems)


def names(items) -> list[str]:
    return [Path(item.absolute_path).name for item in items]


def folder(path: Path) -> str:
    return f"image_dir = '{path}'"


def test_what_is_found(tmp_path):
    for name in ("b.png", "a.JpG", "c.WEBP", "d.bmp"):
        image(tmp_path / "im [1]" / name)
    (tmp_path / "im [1]" / "note.md").touch()
    (tmp_path / "im [1]" / "folder.png").mkdir()
    result = scan(tmp_path, config(folder(tmp_path / "im [1]") + "\nnum_repeats = 3"))
    (items,) = result.train
    assert names(items) == ["a.JpG", "b.png", "c.WEBP", "d.bmp"]
    assert all(
        os.path.isabs(item.absolute_path) and item.image_size == (32, 16) and item.num_repeats == 3 for item in items
    )
    assert result.num_used == 4 and result.num_skipped == 0 and not result.has_validation and result.validation == [[]]
    assert result.tag_frequency == [{"im [1]": {"a cat": 4}}]


@pytest.mark.parametrize("check_images", [True, False])
def test_sizes_are_those_after_orientation(tmp_path, check_images):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "a" / "a.jpg", exif=exif)
    result = scan(tmp_path, config(folder(tmp_path / "a")), check_images=check_images)
    assert result.train[0][0].image_size == (16, 32)


def test_one_folder_in_two_datasets(tmp_path):
    image(tmp_path / "a" / "a.png")
    second = f"[[datasets]]\nresolution = 128\n[[datasets.subsets]]\n{folder(tmp_path / 'a')}\n"
    result = scan(tmp_path, config(folder(tmp_path / "a")) + second)
    assert [names(items) for items in result.train] == [["a.png"], ["a.png"]]
    assert result.train[0][0] is not result.train[1][0] and result.num_used == 1


def test_all_problems_in_one_error(tmp_path):
    image(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "empty.png").touch()
    (tmp_path / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    cut = image(tmp_path / "a" / "cut.png", (200, 200))
    cut.write_bytes(cut.read_bytes()[:5000])
    (tmp_path / "a" / "good.txt").write_bytes(b"\xe9")
    (tmp_path / "void").mkdir()
    text = config(folder(tmp_path / "a"), folder(tmp_path / "none"), head="resolution = 64\nbatch_siz = 1")
    text += f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{folder(tmp_path / 'void')}\n"
    found = "\n".join(problems(tmp_path, text))
    for part in (
        "batch_siz",
        "empty.png",
        "0 bytes",
        "broken.jpg",
        "cut.png",
        "good.txt",
        "none does not exist",
        "void holds no images",
    ):
        assert part in found, part
    assert "datasets[0].subsets[0]" in found


def test_bad_images_can_be_skipped(tmp_path):
    image(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "empty.png").touch()
    result = scan(tmp_path, config(folder(tmp_path / "a"), folder(tmp_path / "none")), skip_bad_images=True)
    assert names(result.train[0]) == ["good.png"]
    assert (result.num_used, result.num_skipped) == (1, 1) and result.summary == "1 image found, 1 left out"
    assert any("empty.png" in line for line in result.warnings) and any(
        "none does not exist" in line for line in result.warnings
    )
    (tmp_path / "a" / "good.png").write_bytes(b"")
    assert "no image" in "".join(problems(tmp_path, config(folder(tmp_path / "a")), skip_bad_images=True))


def test_empty_folder_beside_a_filled_one(tmp_path):
    image(tmp_path / "a" / "a.png")
    image(tmp_path / "b" / "inner" / "a.png")
    text = config(folder(tmp_path / "a"), folder(tmp_path / "b"), head="resolution = 64\nvalidation_split = 0.5")
    result = scan(tmp_path, text)
    assert any("holds no images" in line and "inner" in line for line in result.warnings)
    assert "holds no images" in "".join(problems(tmp_path, config(folder(tmp_path / "b"))))


def test_videos_among_pictures_are_told(tmp_path):
    """They are no data of a folder of pictures, and nobody would notice."""
    image(tmp_path / "a" / "a.png")
    for where in ("a", "b"):
        (tmp_path / where).mkdir(exist_ok=True)
        (tmp_path / where / "clip.MP4").write_bytes(b"x")
    result = scan(tmp_path, config(folder(tmp_path / "a")))
    assert any("clip.MP4" in line and "video_directory" in line for line in result.warnings)
    alone = "".join(problems(tmp_path, config(folder(tmp_path / "b"))))
    assert "holds videos and no images" in alone and "video_directory" in alone


def test_captions(tmp_path):
    image(tmp_path / "a" / "own.png", caption="own")
    image(tmp_path / "a" / "none.png", caption=None)
    image(tmp_path / "a" / "empty.png", caption="")
    image(tmp_path / "b" / "none.png", caption=None)
    text = config(folder(tmp_path / "a"), folder(tmp_path / "b") + '\nclass_tokens = "dog"')
    result = scan(tmp_path, text)
    assert [item.caption for item in result.train[0]] == ["", "", "own", "dog"]
    assert sum("have no caption" in line and "none.png" in line for line in result.warnings) == 1
    assert any("empty caption" in line for line in result.warnings)
    (problem,) = problems(tmp_path, text, fail_on_missing_captions=True)
    assert "1 images have no caption" in problem and "a/none.png" in problem.replace(os.sep, "/")


def test_captions_of_another_extension_are_pointed_out(tmp_path):
    for i in range(25):
        image(tmp_path / "a" / f"{i:02d}.png", caption="x" if i < 16 else None)
    text = config(folder(tmp_path / "a"), rest='caption_extension = ".caption"')
    (line,) = [line for line in scan(tmp_path, text).warnings if "no caption" in line]
    assert (
        line.startswith("25 images in datasets[0].subsets[0] have no caption") and "16 of them have a .txt file" in line
    )
    assert 'caption_extension = ".txt"' in line and "--caption_extension .txt" in line
    (problem,) = problems(tmp_path, text, fail_on_missing_captions=True)
    assert 'caption_extension = ".txt"' in problem
    named = config(folder(tmp_path / "a") + '\nclass_tokens = "dog"', rest='caption_extension = ".caption"')
    (line,) = scan(tmp_path, named).warnings
    assert "train with class_tokens 'dog'" in line and 'caption_extension = ".txt"' in line
    assert "class_tokens = " in "\n".join(scan(tmp_path, config(folder(tmp_path / "a"))).warnings)


def test_small_images_are_left_out_of_one_dataset(tmp_path):
    for name, size in (
        ("large.png", (200, 100)),
        ("wide.png", (160, 64)),
        ("equal.png", (100, 100)),
        ("small.png", (64, 64)),
    ):
        image(tmp_path / "a" / name, size)
    second = (
        f"[[datasets]]\nresolution = 128\nskip_image_resolution = 100\n[[datasets.subsets]]\n{folder(tmp_path / 'a')}\n"
    )
    result = scan(tmp_path, config(folder(tmp_path / "a")) + second)
    assert [names(items) for items in result.train] == [
        ["equal.png", "large.png", "small.png", "wide.png"],
        ["large.png", "wide.png"],
    ]
    assert any("2 of 4 images" in line and "skip_image_resolution 100x100" in line for line in result.warnings)
    everywhere = scan(tmp_path, config(folder(tmp_path / "a")), skip_image_resolution=(160, 64))
    assert names(everywhere.train[0]) == ["large.png"]
    assert "skip_image_resolution 500x500" in "".join(
        problems(tmp_path, config(folder(tmp_path / "a")), skip_image_resolution=(500, 500))
    )


def test_one_stem_twice_is_mentioned(tmp_path):
    image(tmp_path / "a" / "x.png")
    image(tmp_path / "a" / "x.jpg")
    result = scan(tmp_path, config(folder(tmp_path / "a")))
    assert len(result.train[0]) == 2 and any("x.jpg and x.png" in line for line in result.warnings)


def test_only_regularisation_images(tmp_path):
    image(tmp_path / "a" / "a.png")
    assert "regularisation" in "".join(problems(tmp_path, config(folder(tmp_path / "a") + "\nis_reg = true")))
    assert "no image to train on" in "".join(problems(tmp_path, config(folder(tmp_path / "a") + "\nnum_repeats = 0")))


def test_buckets_that_no_image_fits(tmp_path):
    image(tmp_path / "a" / "a.png")
    text = config(folder(tmp_path / "a"), head="resolution = 256\nenable_bucket = true\nbucket_no_upscale = true")
    assert "shorter than one bucket step" in "".join(problems(tmp_path, text))


def test_notes_on_pixels(tmp_path):
    image(tmp_path / "a" / "a.png", mode="RGBA")
    Image.fromarray(np.full((16, 32), 4000, np.uint16)).save(tmp_path / "a" / "deep.png")
    warnings = "\n".join(scan(tmp_path, config(folder(tmp_path / "a"))).warnings)
    assert "transparency" in warnings and "8 bits" in warnings and "deep.png" in warnings
    assert "transparency" not in "\n".join(scan(tmp_path, config(folder(tmp_path / "a")), alpha_mask=True).warnings)


# ---------------------------------------------------------------- cache_info


def test_cached_info_is_true_to_the_folder(tmp_path):
    first = image(tmp_path / "a" / "1.png", caption="one")
    image(tmp_path / "a" / "2.png", caption="two")
    image(tmp_path / "a" / "4.png", caption=None)
    text = config(folder(tmp_path / "a") + '\nclass_tokens = "c"', head="resolution = 64\nvalidation_split = 0.5")
    scan(tmp_path, text, cache_info=True)
    stored = json.loads((tmp_path / "a" / FILE_NAME).read_text(encoding="utf-8"))
    assert sorted(stored) == ["1.png", "2.png", "4.png"] and stored["4.png"]["caption"] is None

    def state():
        result = scan(tmp_path, text, cache_info=True)
        return {
            Path(i.absolute_path).name: (i.caption, i.image_size) for i in (*result.train[0], *result.validation[0])
        }

    assert state() == {"1.png": ("one", (32, 16)), "2.png": ("two", (32, 16)), "4.png": ("c", (32, 16))}
    image(first, (48, 16), caption="another")
    (tmp_path / "a" / "2.png").unlink()
    image(tmp_path / "a" / "3.png", caption="three")
    image(tmp_path / "a" / "4.png", caption="own now")
    assert state() == {"1.png": ("another", (48, 16)), "3.png": ("three", (32, 16)), "4.png": ("own now", (32, 16))}


def test_images_without_a_caption_are_told_with_what_to_do(tmp_path):
    image(tmp_path / "a" / "1.png", caption=None)
    flat = f"[[datasets]]\nresolution = 64\nimage_directory = '{tmp_path / 'a'}'\n"
    assert problems(tmp_path, flat + "caption_extension = '.txt'\n") == [
        f"datasets[0]: no image in {tmp_path / 'a'} that can be used has a caption file (.txt);"
        " write them, or class_tokens for all"
    ]
    [told] = scan(tmp_path, flat).warnings
    assert "have no caption and train with an empty one" in told and "caption files, or write one text" in told
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"image_path": str(tmp_path / "a" / "1.png")}), encoding="utf-8")
    [told] = scan(tmp_path, f"[[datasets]]\nresolution = 64\nimage_jsonl_file = '{listed}'\n").warnings
    assert "write a caption for each there, or write one text" in told
    listed.write_text("", encoding="utf-8")
    [told] = problems(tmp_path, f"[[datasets]]\nresolution = 64\nimage_jsonl_file = '{listed}'\n")
    assert told == f"datasets[0]: {listed} names no image that can be used"


def test_captions_of_a_list_are_not_looked_for_beside_its_images(tmp_path):
    path = image(tmp_path / "1.png", caption="of the file")
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"image_path": str(path), "caption": "of the list"}), encoding="utf-8")
    text = f"[[datasets]]\nresolution = 64\nimage_jsonl_file = '{listed}'\ncaption_extension = '.txt'\n"
    assert [item.caption for item in scan(tmp_path, text).train[0]] == ["of the list"]


def test_cached_captions_are_of_the_form_of_the_dataset(tmp_path):
    image(tmp_path / "a" / "1.png", caption="one\ntwo")
    flat = f"[[datasets]]\nresolution = 64\nimage_directory = '{tmp_path / 'a'}'\ncaption_extension = '.txt'\n"
    for text, caption in (2 * [(config(folder(tmp_path / "a")), "one"), (flat, "one\ntwo")])[:3]:
        assert scan(tmp_path, text, cache_info=True).train[0][0].caption == caption


def test_captions_in_json_stand_before_others_and_broken_ones_are_told_together(tmp_path):
    for name in ("1", "2", "3"):
        image(tmp_path / "a" / f"{name}.png", caption=f"text {name}")
    (tmp_path / "a" / "1.json").write_text('{"nl": "prose", "tags": ["b", "a"], "trigger": "t"}')
    text = config(folder(tmp_path / "a") + "\nprefer_json = true", rest="keep_tokens = 2")
    for _ in range(2):  # the second reads the cache of the folder
        (items,) = (result := scan(tmp_path, text, cache_info=True)).train
        assert [cached_caption(item) for item in items] == ["t, b, a. prose", "text 2", "text 3"]
        assert result.tag_frequency == [{"a": {"t": 1, "b": 1, "a": 1, "text 2": 1, "text 3": 1}}]
    (tmp_path / "a" / "1.json").write_text('{"tags": ["other"]}')
    assert cached_caption(scan(tmp_path, text, cache_info=True).train[0][0]) == "other"
    for name in ("1", "2"):
        (tmp_path / "a" / f"{name}.json").write_text("{")
    assert [Path(line.partition(".json")[0]).name for line in problems(tmp_path, text)] == ["1", "2"]
    refused = problems(tmp_path, text.replace("keep_tokens = 2", 'prefer_json = "yes"'))
    assert any("prefer_json" in line and "true or false" in line for line in refused)


def test_unchanged_images_are_not_read_again(tmp_path):
    path = image(tmp_path / "a" / "1.png")
    scan(tmp_path, config(folder(tmp_path / "a")), cache_info=True)
    status, size = path.stat(), path.stat().st_size
    path.write_bytes(b"x" * size)  # the same stamp: the cache is believed
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scan(tmp_path, config(folder(tmp_path / "a")), cache_info=True).train[0][0].image_size == (32, 16)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert "1.png" in "".join(problems(tmp_path, config(folder(tmp_path / "a")), cache_info=True))


def test_info_of_other_form_is_made_anew(tmp_path):
    path = image(tmp_path / "a" / "1.png", caption="mine")
    old = {str(path): {"caption": "old", "resolution": [1, 1]}, "1.png": {"caption": "old", "resolution": [1, 1]}}
    for content in (json.dumps(old), "not json", "[]"):
        (tmp_path / "a" / FILE_NAME).write_text(content)
        (item,) = scan(tmp_path, config(folder(tmp_path / "a")), cache_info=True).train[0]
        assert (item.caption, item.image_size) == ("mine", (32, 16))


# ---------------------------------------------------------------- masks


def test_masks_are_paired_by_stem(tmp_path):
    image(tmp_path / "a" / "1.png")
    image(tmp_path / "a" / "2.png")
    image(tmp_path / "m" / "1.jpg", caption=None)
    image(tmp_path / "m" / "2.PNG", caption=None)
    image(tmp_path / "m" / "extra.png", caption=None)
    Image.new("RGB", (32, 16)).save(tmp_path / "m" / "2.PNG")
    text = config(folder(tmp_path / "a") + f"\nconditioning_data_dir = '{tmp_path / 'm'}'")
    result = scan(tmp_path, text, masked_loss=True)
    assert [Path(item.cond_path).name for item in result.train[0]] == ["1.jpg", "2.PNG"]
    assert any("extra.png" in line for line in result.warnings)
    assert not any("black" in line for line in result.warnings)  # no pixel is read for it
    thorough = scan(tmp_path, text, masked_loss=True, check_images=True)
    assert any("black" in line and "2.PNG" in line and "1.jpg" not in line for line in thorough.warnings)


def test_faulty_masks(tmp_path):
    for name in ("1", "2", "3"):
        image(tmp_path / "a" / f"{name}.png")
    image(tmp_path / "m" / "1.png", (16, 16), caption=None)
    (tmp_path / "m" / "2.png").write_bytes(b"x")
    text = config(folder(tmp_path / "a") + f"\nconditioning_data_dir = '{tmp_path / 'm'}'")
    found = "\n".join(problems(tmp_path, text, masked_loss=True))
    assert "is 16x16, its image is 32x16" in found and "2.png is not an image" in found and "no image named 3" in found
    missing = config(folder(tmp_path / "a") + f"\nconditioning_data_dir = '{tmp_path / 'none'}'")
    (problem,) = [line for line in problems(tmp_path, missing, masked_loss=True) if "none" in line]
    assert "does not exist" in problem


# ---------------------------------------------------------------- metadata files


def metadata(tmp_path: Path, content, name: str = "m.json") -> str:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return f"metadata_file = '{path}'"


def test_metadata_keys_of_every_form(tmp_path):
    whole = image(tmp_path / "b" / "3.png", caption=None)
    image(tmp_path / "a" / "1.png", caption=None)
    image(tmp_path / "a" / "2.WEBP", caption=None)
    entries = {
        "1.png": {"caption": "c", "tags": "x, y"},
        "2": {"tags": "y"},
        str(whole): {"caption": "w", "image_size": [32, 16]},
    }
    result = scan(tmp_path, config(folder(tmp_path / "a") + "\n" + metadata(tmp_path, entries)))
    found = {Path(item.absolute_path).name: item.caption for item in result.train[0]}
    assert found == {"1.png": "c,x, y", "2.WEBP": "y", "3.png": "w"}
    assert result.tag_frequency == [{"m.json": {"x": 1, "y": 2}}]
    assert all(item.absolute_path.lower().endswith((".png", ".webp")) for item in result.train[0])


def test_metadata_lines(tmp_path):
    path = image(tmp_path / "a" / "1.png", caption=None)
    good = json.dumps({"image_path": str(path), "caption": "c"})
    result = scan(tmp_path, config(metadata(tmp_path, f"{good}\n\n", "m.jsonl")))
    assert result.train[0][0].caption == "c"
    odd = json.dumps(
        {"image_path": str(path), "caption": "one\u2028two"}, ensure_ascii=False
    )  # a separator, but no end of line
    assert scan(tmp_path, config(metadata(tmp_path, f"{odd}\r\n", "m.jsonl"))).train[0][0].caption == "one\u2028two"
    faulty = config(metadata(tmp_path, f'{good}\n{{"caption": 1}}\nnonsense\n{{"caption": "x"}}\n', "m.jsonl"))
    found = "\n".join(problems(tmp_path, faulty))
    assert "m.jsonl:2" in found and "m.jsonl:3" in found and "m.jsonl:4 has no image_path" in found


def test_faulty_metadata(tmp_path):
    image(tmp_path / "a" / "1.png", caption=None)
    entries = {"1.png": {"caption": "c"}, "no.png": {}, "nothing": {}}
    text = config(folder(tmp_path / "a") + "\n" + metadata(tmp_path, entries))
    found = problems(tmp_path, text)
    assert len(found) == 2 and "no.png" in "".join(found) and "nothing" in "".join(found)
    result = scan(tmp_path, text, skip_bad_images=True)
    assert names(result.train[0]) == ["1.png"] and result.num_skipped == 2
    assert "object" in "".join(problems(tmp_path, config(metadata(tmp_path, []))))
    assert "image_dir" in "".join(problems(tmp_path, config(metadata(tmp_path, {"1.png": {}}))))
    assert "does not exist" in "".join(problems(tmp_path, config("metadata_file = 'none.json'")))


def test_one_key_in_two_metadata_files(tmp_path):
    """The images of two subsets with one key stay two images."""
    image(tmp_path / "a" / "1.png", caption=None)
    image(tmp_path / "b" / "1.png", caption=None)
    first = folder(tmp_path / "a") + "\n" + metadata(tmp_path, {"1.png": {"caption": "a"}})
    second = folder(tmp_path / "b") + "\n" + metadata(tmp_path, {"1.png": {"caption": "b"}}, "n.json")
    assert [item.caption for item in scan(tmp_path, config(first, second)).train[0]] == ["a", "b"]


# ---------------------------------------------------------------- split


def test_a_subset_has_its_own_fraction(tmp_path):
    for i in range(10):
        image(tmp_path / "a" / f"{i}.png")
        image(tmp_path / "b" / f"{i}.png")
    text = config(
        folder(tmp_path / "a") + "\nvalidation_split = 0.5",
        folder(tmp_path / "b"),
        head="resolution = 64\nvalidation_split = 0.1",
    )
    result = scan(tmp_path, text, seed=1)
    held_out = [item.subset.image_dir for item in result.validation[0]]
    assert held_out.count(str(tmp_path / "a")) == 5 and held_out.count(str(tmp_path / "b")) == 1
    assert all(item.num_repeats == 1 for item in result.validation[0])
