"""Sizes and crops that SDXL is told, against the recorded cases."""

from __future__ import annotations

import pytest

from library.dataset.bucket import centre_offset, cover_size
from library.dataset.samples import Geometry
from tests.golden_dir import behaviour_cases


@pytest.mark.parametrize("case", behaviour_cases("sdxl_conditioning.json"))
def test_numbers_of_a_crop(case) -> None:
    given, expected = case["input"], case["expected"]
    width, height = given["image_size"]
    if given.get("exif_orientation", 1) >= 5:  # the picture lies on its side
        width, height = height, width
    bucket, resized = tuple(given["bucket"]), tuple(given["resized"])
    assert cover_size((width, height), bucket) == resized
    offset = given["random_crop_offset"]
    geometry = Geometry(resized, bucket, tuple(offset) if offset else centre_offset(resized, bucket))
    assert list(geometry.crop_ltrb) == expected["crop_ltrb"]
    assert list(geometry.top_left(given["flipped"])) == expected["crop_top_left"]
    assert [[height, width], [bucket[1], bucket[0]]] == [expected["original_size"], expected["target_size"]]
