"""Buckets beyond the reference cases: crops as stored, regularisation, warnings."""

from __future__ import annotations

import pytest

from library.dataset.bucket import (
    BucketSelector,
    assign_buckets,
    balance_regularization,
    cover_size,
    crop_ltrb,
    effective_limits,
    make_bucket_resolutions,
)
from library.dataset.items import DatasetParams, ImageItem, SubsetParams


def items_of(*sizes, reg: int = 0, num_repeats: int = 1) -> list[ImageItem]:
    train = [ImageItem(str(i), f"{i}.png", "", SubsetParams(), size, num_repeats) for i, size in enumerate(sizes)]
    others = [ImageItem(f"r{i}", f"r{i}.png", "", SubsetParams(is_reg=True), (64, 64), 1) for i in range(reg)]
    return train + others


@pytest.mark.parametrize(
    ("resolution", "limit", "count"), [(512, 1024, 17), (768, 1024, 19), (1024, 1024, 25), (1024, 2048, 41)]
)
def test_known_counts(resolution, limit, count):
    sizes = make_bucket_resolutions((resolution, resolution), 256, limit, 64)
    assert len(sizes) == len(set(sizes)) == count
    assert sizes == sorted(sizes)
    assert all(w * h <= resolution**2 for w, h in sizes)


def test_limits_go_to_the_grid():
    assert effective_limits(250, 1000, 64) == (192, 1024)
    assert effective_limits(256, 1024, 64) == (256, 1024)


def test_a_minimum_below_one_step_is_one_step():
    assert effective_limits(16, 1024, 64) == (64, 1024)
    assert BucketSelector((512, 512), min_bucket_reso=16).predefined[0] == (64, 1024)


def test_crop_is_that_of_the_pixels():
    """The margins belong to the covered image, not to a letterbox, and hold for the mirrored sample too."""
    choice = BucketSelector((1024, 1024), max_bucket_reso=2048).select((1200, 800))
    assert choice.bucket_reso == (1216, 832) and choice.resized_size == (1248, 832)
    assert choice.crop_ltrb == (16, 0, 1200, 832)
    assert crop_ltrb((100, 80), (100, 80), (0, 0)) == (0, 0, 100, 80)
    left, _, right, _ = crop_ltrb((130, 100), (100, 100), (10, 0))
    assert left == 10 and 100 - right == 20  # 130 - 100 - 10 are cut on the right


@pytest.mark.parametrize("size", [(63, 100), (100, 63), (1, 1), (8, 2000)])
def test_no_bucket_has_a_zero_side(size):
    assert BucketSelector((1024, 1024), bucket_no_upscale=True).select(size) is None
    assert min(BucketSelector((1024, 1024)).select(size).bucket_reso) >= 256


def test_covering_never_leaves_a_gap():
    for width in range(1, 300, 7):
        for height in range(1, 300, 11):
            resized = cover_size((width, height), (192, 128))
            assert resized[0] >= 192 and resized[1] >= 128 and (resized[0] == 192 or resized[1] == 128)


def test_small_images_are_left_out_and_named():
    params = DatasetParams(resolution=(512, 512), enable_bucket=True, bucket_no_upscale=True)
    items = items_of((40, 500), (500, 500))
    result = assign_buckets(items, params)
    assert result.too_small == (0,) and result.repeats == (0, 1)
    assert [bucket.samples for bucket in result.buckets] == [(1,)]
    assert any("0.png" in line for line in result.warnings)


def test_worst_crops_and_enlargements_are_reported():
    params = DatasetParams(resolution=(1024, 1024), enable_bucket=True)
    result = assign_buckets(items_of((4000, 100), (64, 64), (1024, 1024)), params)
    assert any("crop" in line and "0.png" in line and "1.png" not in line for line in result.warnings)
    assert any("enlarged" in line and "1.png" in line for line in result.warnings)


def test_without_buckets_there_is_one_and_no_record():
    result = assign_buckets(items_of((300, 200), (100, 400)), DatasetParams(resolution=(128, 64), batch_size=2))
    assert [bucket.bucket for bucket in result.buckets] == [(128, 64)]
    assert result.bucket_info is None and result.num_batches == 1


def test_regularisation_is_balanced_within_the_dataset():
    result = assign_buckets(items_of((64, 64), reg=5, num_repeats=12), DatasetParams(resolution=(64, 64)))
    assert sorted(result.repeats) == [2, 2, 2, 3, 3, 12]
    few = assign_buckets(items_of((64, 64), reg=5, num_repeats=2), DatasetParams(resolution=(64, 64)))
    assert sum(few.repeats) == 4 and any("3 regularisation images are not used" in line for line in few.warnings)


def test_which_regularisation_images_are_used_follows_the_seed():
    """Not always the head of the list; the same seed gives the same choice."""
    choices = {tuple(balance_regularization(3, [1] * 20, seed=seed)) for seed in range(20)}
    assert len(choices) > 10
    assert balance_regularization(3, [1] * 20, seed=4) == balance_regularization(3, [1] * 20, seed=4)
    assert balance_regularization(3, [0, 0], seed=1) == [0, 0]


@pytest.mark.parametrize("size, settings, reason", [
    ((300, 100), {}, "the reason is enable_bucket = false"),
    ((2048, 512), {"enable_bucket": True, "max_bucket_reso": 1024, "min_bucket_reso": 512}, "max_bucket_reso = 1024 (2048 would do)"),
    ((512, 2048), {"enable_bucket": True, "max_bucket_reso": 2048, "min_bucket_reso": 1024}, "min_bucket_reso = 1024 (512 would do)"),
    ((100, 100), {"enable_bucket": True, "bucket_no_upscale": True}, "bucket_reso_steps = 64 (a smaller one would do)"),
    ((8000, 10), {"enable_bucket": True}, "no setting of the buckets helps"),
])  # fmt: skip
def test_a_large_cut_names_the_setting_that_causes_it(size, settings, reason):
    params = DatasetParams(resolution=(1024, 1024), **settings)
    item = ImageItem(image_key="a", absolute_path="a.png", caption="", subset=SubsetParams(), image_size=size)
    (line,) = [line for line in assign_buckets([item], params).warnings if "crop" in line]
    assert reason in line and f"{size[0]}x{size[1]} in " in line
