"""Buckets: lists of sizes, the choice for an image, assignment with repeats, balance of regularisation images."""

from __future__ import annotations

import pytest

from library.dataset.bucket import BucketSelector, assign_buckets, balance_regularization
from library.dataset.items import DatasetParams, ImageItem, SubsetParams
from tests.golden_dir import behaviour_cases


def of_kind(kind: str):
    return behaviour_cases("buckets.json", where=lambda case: case["id"].startswith(kind))


def selector_of(settings: dict) -> BucketSelector:
    return BucketSelector.of(params_of(settings))


def params_of(settings: dict) -> DatasetParams:
    return DatasetParams(**{**settings, "resolution": tuple(settings["resolution"])})


@pytest.mark.parametrize("case", of_kind("setting"))
def test_choice(case):
    selector, expected = selector_of(case["input"]), case["expected"]
    if "buckets" in expected:
        assert [list(size) for size in selector.predefined] == expected["buckets"]
    if "effective_min_bucket_reso" in expected:
        assert (selector.min_reso, selector.max_reso) == (
            expected["effective_min_bucket_reso"], expected["effective_max_bucket_reso"]
        )
    for image in expected["images"]:
        choice = selector.select(tuple(image["size"]))
        if image["bucket"] is None:
            assert choice is None, image
            continue
        left, top = choice.crop_offset
        assert list(choice.bucket_reso) == image["bucket"], image
        assert list(choice.resized_size) == image["resized"], image
        assert [left, top, left + choice.bucket_reso[0], top + choice.bucket_reso[1]] == image["crop"], image
        assert choice.ar_error == pytest.approx(image["ar_error"], abs=1e-6)


@pytest.mark.parametrize("case", of_kind("assignment"))
def test_assignment(case):
    settings = {name: value for name, value in case["input"].items() if name != "images"}
    params = params_of(settings)
    items = [
        ImageItem(str(i), str(i), "", SubsetParams(), tuple(image["size"]), image["num_repeats"])
        for i, image in enumerate(case["input"]["images"])
    ]
    assignment = assign_buckets(items, params)
    got = [
        {"resolution": list(b.bucket), "count": len(b.samples), "batches": -(-len(b.samples) // b.batch_size)}
        for b in assignment.buckets
    ]
    assert got == case["expected"]["buckets"]
    assert assignment.num_batches == case["expected"]["num_batches"]
    info = assignment.bucket_info
    if info is None:
        assert not params.enable_bucket
    else:
        assert info["mean_img_ar_error"] == pytest.approx(case["expected"]["mean_abs_ar_error"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("case", of_kind("regularization"))
@pytest.mark.parametrize("seed", [0, 1, 123])
def test_regularization(case, seed):
    total = case["input"]["training_repeats_in_total"]
    counts = balance_regularization(total, case["input"]["reg_num_repeats"], seed=seed)
    assert sorted(count for count in counts if count) == sorted(case["expected"]["multiset_of_reg_repeats"])
    assert total + sum(counts) == case["expected"]["samples_in_total"]
