"""Buckets by the area rule: lists, choices of pictures and clips, sizes of control pictures, and who shares a batch."""

from __future__ import annotations

import pytest

from library.dataset.area_buckets import area_buckets, area_problem, control_bucket, own_bucket
from library.dataset.bucket import BucketSelector, assign_buckets, centre_offset, cover_size
from library.dataset.clips.windows import ClipWindow
from library.dataset.items import DatasetParams, ImageItem, SubsetParams
from library.dataset.media_utils import usual_filter
from tests.golden_dir import behaviour_cases

FILE = "video_buckets.json"
STEPS = {"ho1": 32}
"""of architectures whose sides are no multiples of 16"""


def step_of(given: dict) -> int:
    return STEPS.get(given["architecture"], 16)


def params_of(given: dict, **more) -> DatasetParams:
    return DatasetParams(
        resolution=tuple(given["resolution"]), bucket_rule="area", bucket_reso_steps=step_of(given),
        enable_bucket=given["enable_bucket"], bucket_no_upscale=given.get("bucket_no_upscale", False), **more
    )


@pytest.mark.parametrize("case", behaviour_cases(FILE, "lists"))
def test_lists(case):
    given, expected = case["input"], case["expected"]
    found = area_buckets(tuple(given["resolution"]), expected["step"])
    assert expected["step"] == step_of(given) and [list(size) for size in found] == expected["buckets"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "refused"))
def test_refused(case):
    resolution = tuple(case["input"]["resolution"])
    problem = area_problem(resolution, step_of(case["input"]))
    assert f"{resolution[0]}x{resolution[1]}" in problem
    with pytest.raises(ValueError, match="two steps"):
        BucketSelector.of(params_of(case["input"]))


@pytest.mark.parametrize("case", behaviour_cases(FILE, "choices"))
def test_choices(case):
    selector = BucketSelector.of(params_of(case["input"]))
    for image in case["expected"]["images"]:
        choice = selector.select(tuple(image["size"]))
        if image["bucket"] is None:
            assert choice is None, image
            continue
        left, top = choice.crop_offset
        assert list(choice.bucket_reso) == image["bucket"], image
        assert list(choice.resized_size) == image["resized"], image
        assert [left, top, left + choice.bucket_reso[0], top + choice.bucket_reso[1]] == image["crop"], image
        is_same = image["size"] == image["resized"]  # area and none are one then
        assert is_same or usual_filter(tuple(image["size"]), choice.resized_size) == image["filter"], image
    for clip in case["expected"]["clips"]:
        choice = selector.select(tuple(clip["size"]))
        assert clip["bucket"] == (None if choice is None else [*choice.bucket_reso, clip["frames"]]), clip


@pytest.mark.parametrize("case", behaviour_cases(FILE, "own_resolution"))
def test_own_resolution(case):
    given = case["input"]
    found = own_bucket(tuple(given["image_size"]), tuple(given["control_resolution"]), step_of(given))
    assert list(found) == case["expected"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "controls"))
def test_controls(case):
    given, expected = case["input"], case["expected"]
    size, area = tuple(given["control_size"]), given["control_resolution"]
    bucket = control_bucket(
        size, tuple(given["bucket"]), step_of(given), no_resize=given["no_resize_control"],
        resolution=tuple(area) if area else None,
    )
    resized = cover_size(size, bucket)
    left, top = centre_offset(resized, bucket)
    assert list(bucket) == expected["size"] and list(resized) == expected["resized"]
    assert [left, top, left + bucket[0], top + bucket[1]] == expected["crop"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "groups"))
def test_groups(case):
    given, expected = case["input"], case["expected"]
    repeats = given.get("num_repeats", 1)
    items = [item_of(values, repeats) for values in given["items"]]
    assignment = assign_buckets(items, params_of(given, batch_size=given["batch_size"]), finest_step=step_of(given))
    found = [sorted(name_of(given["items"][i]) for i in bucket.samples) for bucket in assignment.buckets]
    assert sorted(found) == sorted(map(sorted, expected["buckets"]))
    assert assignment.num_batches == expected["num_batches"]


def name_of(values: dict) -> str:
    return values["name"] + (f"/s{values['section']}" if "section" in values else "")


def item_of(values: dict, repeats: int) -> ImageItem:
    frames, controls = values["frames"] or 1, values.get("control_latents_hw") or []
    return ImageItem(
        image_key=values["name"], absolute_path=f"/{values['name']}", caption="",
        subset=SubsetParams(no_resize_control=True),
        image_size=tuple(values["size"]), num_repeats=repeats, frames=frames,
        clip=ClipWindow(0, frames, values.get("section")) if values["frames"] else None,
        control_paths=tuple(f"/control_{i}" for i in range(len(controls))),
        control_image_sizes=tuple((8 * w, 8 * h) for h, w in controls),
    )
