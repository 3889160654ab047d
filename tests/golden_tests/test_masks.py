"""Loss masks against recorded weights and losses: sources, area averaging, mirroring, geometry of mask images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.batch import CONDITIONING_IMAGES, Batch
from library.dataset.bucket import BucketSelector
from library.dataset.collate import Sample, collate
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.media_utils import alpha_to_mask, decode_image
from library.dataset.plan import BatchRequest
from library.dataset.samples import Geometry, image_tensor, mask_tensor, picture_tensors, read_pictures
from library.training.losses.reduction import loss_mask
from tests.golden_dir import behaviour_cases

FILE = "masks.json"


def is_geometry(case) -> bool:
    return "conditioning_size" in case["input"]


def sample(shape_hw: tuple[int, int], tmp_path, *, alpha=None, red=None, flipped: bool = False) -> Sample:
    """A sample whose alpha channel or red channel went through a file."""
    entry = Sample(
        image_key="a", caption="", text_outputs=None, loss_weight=1.0, original_size_hw=shape_hw, crop_top_left=(0, 0),
        target_size_hw=shape_hw, flipped=flipped,
    )
    if alpha is not None:
        pixels = np.zeros((*shape_hw, 4), np.uint8)
        pixels[..., 3] = alpha
        Image.fromarray(pixels).save(tmp_path / "alpha.png")
        entry.alpha_mask = mask_tensor(alpha_to_mask(decode_image(tmp_path / "alpha.png", with_alpha=True)), flipped)
    if red is not None:
        pixels = np.zeros((*shape_hw, 3), np.uint8)
        pixels[..., 0] = red
        Image.fromarray(pixels).save(tmp_path / "mask.png")
        entry.conditioning = image_tensor(decode_image(tmp_path / "mask.png"), flipped)
    return entry


def ramp_png(size: list[int]) -> bytes:
    """An image whose red and green are the place of each pixel's centre, from left to right and from top to bottom."""
    columns, rows = ((np.arange(length) + 0.5) / length * 255 for length in size)
    red, green = np.meshgrid(columns, rows)
    pixels = np.stack((red, green, np.zeros_like(red)), axis=2).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def edge(length: int) -> float:
    """How far an enlarged ramp may be off at its ends, where half a pixel has no neighbour."""
    return 0.5 / length


def batch_of(samples: list[Sample]) -> Batch:
    count = len(samples)
    request = BatchRequest(0, tuple(range(count)), tuple(range(count)), 1, 0, 0, count, True, True)
    return collate(request, samples, None)


@pytest.mark.parametrize("case", behaviour_cases(FILE, where=lambda case: not is_geometry(case)))
def test_mask_and_masked_loss(case, tmp_path):
    given, expected = case["input"], case["expected"]
    flipped = given.get("flipped", False)
    if given["source"] is None:
        samples = [sample(np.shape(given["loss"])[1:], tmp_path)]
    elif given["source"] == "both":
        alpha, red = given["alpha_u8"], given["conditioning_r_u8"]
        samples = [sample(np.shape(alpha), tmp_path, flipped=flipped, alpha=alpha, red=red)]
    else:
        key = "alpha" if given["source"] == "alpha" else "red"
        masks = given["masks_u8"] if "masks_u8" in given else [given["mask_u8"]]
        shape = np.shape(next(mask for mask in masks if mask is not None))
        samples = [
            sample(shape, tmp_path, flipped=flipped, **({key: mask} if mask is not None else {})) for mask in masks
        ]
    latent_hw = tuple(given.get("latent_size_hw") or np.shape(given["loss"])[1:])
    batch = batch_of(samples)
    shape = torch.Size((len(batch), 4, *latent_hw))
    mask = loss_mask(batch.conditioning_images, batch.alpha_masks, shape, masked_loss=True)  # [B, 1, h, w]
    if "mask" in expected:
        np.testing.assert_allclose(mask[0, 0].numpy(), expected["mask"], atol=1e-6, rtol=0)
    if "masks" in expected:
        np.testing.assert_allclose(mask[:, 0].numpy(), expected["masks"], atol=1e-6, rtol=0)
    if "masked_loss_mean" in expected:
        loss = torch.tensor(given["loss"]).unsqueeze(0)
        assert (loss if mask is None else loss * mask).mean().item() == pytest.approx(
            expected["masked_loss_mean"], rel=1e-6, abs=1e-8
        )


@pytest.mark.parametrize("case", behaviour_cases(FILE, where=is_geometry))
def test_mask_image_is_resized_and_cropped_like_its_image(case, tmp_path):
    given, expected = case["input"], case["expected"]
    size, bucket = tuple(given["image_size"]), tuple(given["bucket"])
    choice = BucketSelector(bucket, enable_bucket=False).select(size)
    left, top = choice.crop_offset
    assert list(choice.resized_size) == expected["resized"]
    assert [left, top, left + bucket[0], top + bucket[1]] == expected["crop"]
    (tmp_path / "mask.png").write_bytes(ramp_png(given["conditioning_size"]))
    item = ImageItem(
        image_key="a", absolute_path=str(tmp_path / "a.png"), caption="", subset=SubsetParams(), image_size=size,
        bucket_reso=bucket, resized_size=choice.resized_size, cond_path=str(tmp_path / "mask.png"),
    )
    pictures = read_pictures(item, Geometry.centred(item), (CONDITIONING_IMAGES,))
    shown = picture_tensors(pictures)[CONDITIONING_IMAGES] / 2 + 0.5  # [3, H, W]
    for axis, values in ((0, shown[0].mean(dim=0)), (1, shown[1].mean(dim=1))):
        places = (np.arange(bucket[axis]) + (left, top)[axis] + 0.5) / expected["resized"][
            axis
        ]  # in the whole image, 0..1
        np.testing.assert_allclose(values.numpy(), places, atol=0.006 + edge(size[axis]))
