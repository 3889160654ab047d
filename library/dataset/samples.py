"""The pixels of one sample: read, scaled, cropped, coloured, mirrored; the same for training, caching and masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from library.dataset.bucket import centre_offset, crop_ltrb
from library.dataset.items import ImageItem
from library.dataset.media_utils import (
    ColorChange,
    alpha_to_mask,
    change_color,
    decode_frames,
    read_conditioning_image,
    resize_and_crop,
)

Size = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Scale an image to `resized` and cut `bucket` at `offset` (left, top); all (width, height), not mirrored."""

    resized: Size
    bucket: Size
    offset: Size

    @classmethod
    def centred(cls, item: ImageItem) -> Geometry:
        """The crop of caches and of all samples without a random crop."""
        return cls(item.resized_size, item.bucket_reso, centre_offset(item.resized_size, item.bucket_reso))

    @property
    def crop_ltrb(self) -> tuple[int, int, int, int]:
        return crop_ltrb(self.resized, self.bucket, self.offset)

    def top_left(self, flipped: bool) -> Size:
        """(top, left) margins that are cut from the sample as it is seen: mirrored, the right margin is on the left."""
        left, top, right, _ = self.crop_ltrb
        return top, self.bucket[0] - right if flipped else left


@dataclass(frozen=True)
class Pixels:
    """A picture or clip at its training size, not mirrored."""

    image: np.ndarray  # [H, W, 3] or [F, H, W, 3] uint8
    alpha_mask: np.ndarray | None = None  # [H, W] or [F, H, W] float32, 0..1


def read_pixels(
    item: ImageItem, geometry: Geometry, *, with_alpha: bool = False, color: ColorChange | None = None
) -> Pixels:
    """Decode a picture or clip to its training size, all frames alike. Raises ImageFileError, which names the file."""
    frames = [
        resize_and_crop(frame, geometry.resized, geometry.bucket, geometry.offset, item.subset.resize_interpolation)
        for frame in decode_frames(item.absolute_path, item.frames, with_alpha=with_alpha)  # [H, W, 3 or 4]
    ]
    alpha = _stacked([alpha_to_mask(frame) for frame in frames]) if with_alpha else None
    colors = [frame[..., :3] for frame in frames]
    return Pixels(_stacked(colors if color is None else [change_color(frame, color) for frame in colors]), alpha)


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    """[F, ...] of several frames; the one frame of a picture as it is."""
    return frames[0] if len(frames) == 1 else np.stack(frames)


def image_tensor(image: np.ndarray, flipped: bool = False) -> torch.Tensor:
    """uint8 [..., H, W, 3] -> float32 [3, ..., H, W] in -1..1, mirrored when `flipped`."""
    if flipped:
        image = image[..., ::-1, :]
    values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))  # [3, H, W] or [3, F, H, W]
    return values.float() / 127.5 - 1


def mask_tensor(mask: np.ndarray | torch.Tensor, flipped: bool = False) -> torch.Tensor:
    """[..., H, W] weights as float32, mirrored when `flipped`."""
    tensor = torch.as_tensor(mask, dtype=torch.float32)
    return tensor.flip(-1) if flipped else tensor


def conditioning_tensor(item: ImageItem, geometry: Geometry, flipped: bool = False) -> torch.Tensor:
    """The mask or control image of a sample, [3, H, W] in -1..1: scaled, cropped and mirrored exactly like its
    image."""
    return image_tensor(read_conditioning(item, geometry), flipped)


def read_conditioning(item: ImageItem, geometry: Geometry) -> np.ndarray:
    """The mask or control image [H, W, 3] uint8, not mirrored."""
    return read_conditioning_image(
        item.cond_path, item.image_size, geometry.resized, geometry.bucket, geometry.offset,
        item.subset.resize_interpolation
    )
