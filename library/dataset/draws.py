"""The random decisions about the pixels of one sample, keyed by step and position. Validation makes none."""

from __future__ import annotations

from library.core.keyed_random import keyed_random
from library.dataset.captions import face_numbers
from library.dataset.items import ImageItem
from library.dataset.media_utils import ColorChange, draw_color_change, face_crop_geometry, random_offset
from library.dataset.plan import BatchRequest
from library.dataset.samples import Geometry


def sample_flip(seed: int, item: ImageItem, request: BatchRequest, position: int) -> bool:
    """Whether the sample is mirrored: half of the time with flip_aug."""
    if not (item.subset.flip_aug and request.is_training):
        return False
    return keyed_random(seed, "flip", request.step, position).random() < 0.5


def sample_color(seed: int, item: ImageItem, request: BatchRequest, position: int) -> ColorChange | None:
    if not (item.subset.color_aug and request.is_training):
        return None
    return draw_color_change(keyed_random(seed, "color", request.step, position))


def sample_geometry(seed: int, item: ImageItem, request: BatchRequest, position: int, enable_bucket: bool) -> Geometry:
    """The centre crop, or a random one with random_crop, or one around a face with face_crop_aug_range."""
    subset = item.subset
    if not request.is_training or item.latents is not None or item.latents_npz is not None:
        return Geometry.centred(item)
    rng = keyed_random(seed, "crop", request.step, position)
    face = face_numbers(item.absolute_path) if subset.face_crop_aug_range and not enable_bucket else None
    if face is not None:
        crop = face_crop_geometry(
            item.image_size, item.bucket_reso, face, subset.face_crop_aug_range, rng, random_crop=subset.random_crop
        )
        return Geometry(crop.resized, item.bucket_reso, crop.offset)
    if subset.random_crop:
        return Geometry(item.resized_size, item.bucket_reso, random_offset(item.resized_size, item.bucket_reso, rng))
    return Geometry.centred(item)
