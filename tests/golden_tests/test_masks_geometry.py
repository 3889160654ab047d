"""How a mask or control image is scaled and cropped: as the image that it belongs to."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from library.dataset.bucket import centre_offset, cover_size
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.media_utils import resize_and_crop
from library.dataset.samples import Geometry, read_pictures
from tests.golden_dir import behaviour_cases


@pytest.mark.parametrize("case", behaviour_cases("masks.json", where=lambda case: case["id"].startswith("geometry")))
def test_geometry(case, tmp_path):
    size, bucket = tuple(case["input"]["image_size"]), tuple(case["input"]["bucket"])
    resized = cover_size(size, bucket)
    left, top = offset = centre_offset(resized, bucket)
    assert list(resized) == case["expected"]["resized"]
    assert [left, top, left + bucket[0], top + bucket[1]] == case["expected"]["crop"]

    ramp = np.tile(((np.arange(size[0]) + 0.5) / size[0] * 255)[None, :, None], (size[1], 1, 3)).astype(np.uint8)
    path = tmp_path / "mask.png"
    Image.fromarray(ramp).save(path)
    item = ImageItem("a", "a.png", "", SubsetParams(), size, cond_path=str(path))
    mask = read_pictures(item, Geometry(resized, bucket, offset), ("conditioning_images",))["conditioning_images"]
    assert mask.shape == (bucket[1], bucket[0], 3)
    assert np.array_equal(mask, resize_and_crop(ramp, resized, bucket, offset))
    # columns of the crop show what lies at the same place of the picture
    expected_left = 255 * (left + 0.5) / resized[0]
    assert (
        abs(float(mask[0, 0, 0]) - expected_left) <= 2 + 255 * 0.5 / size[0]
    )  # an enlarged ramp is flat for half a pixel
