"""Sizes and crops that SDXL is told, against the recorded cases."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.dataset.bucket import centre_offset, cover_size
from library.dataset.items import SubsetParams
from library.dataset.media_utils import image_size
from library.dataset.samples import Geometry
from tests.golden_dir import behaviour_cases
from tests.library.dataset.images import epoch_requests, make_group, make_item
from tests.library.dataset.small_family import small_strategies


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


@pytest.mark.parametrize(
    "case", behaviour_cases("sdxl_conditioning.json", where=lambda case: not case["input"]["random_crop_offset"])
)
def test_numbers_of_a_file(case, tmp_path: Path) -> None:
    """The same through an image file and a batch. The bucket is given: one that is the resolution."""
    given, expected = case["input"], case["expected"]
    path = tmp_path / "picture.jpg"
    exif = Image.Exif()
    exif[0x0112] = given.get("exif_orientation", 1)
    Image.new("RGB", tuple(given["image_size"])).save(path, exif=exif)
    item = make_item(path, image_size(path), subset=SubsetParams(flip_aug=True))
    group = make_group([item], resolution=tuple(given["bucket"]), enable_bucket=False)
    group.set_strategies(small_strategies())
    batches = (group.load(request) for epoch in range(1, 30) for request in epoch_requests(group, epoch))
    batch = next(batch for batch in batches if batch.flippeds == [given["flipped"]])
    found = {
        "original_size": batch.original_sizes_hw, "crop_top_left": batch.crop_top_lefts,
        "target_size": batch.target_sizes_hw,
    }  # fmt: skip
    assert {name: numbers[0].tolist() for name, numbers in found.items()} == {name: expected[name] for name in found}
    assert list(batch.images.shape[2:]) == expected["target_size"]
