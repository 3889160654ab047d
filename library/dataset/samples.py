"""The pixels of one sample: read, scaled, cropped, coloured, mirrored; the same for training, caching, masks and
control pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from library.dataset.batch import CONDITIONING_ALPHA, CONDITIONING_IMAGES, numbered
from library.dataset.bucket import centre_offset, cover_size, crop_ltrb
from library.dataset.clips.video_files import frames_of
from library.dataset.items import ImageItem
from library.dataset.media_utils import (
    ColorChange,
    alpha_to_mask,
    change_color,
    check_conditioning_size,
    decode_frames,
    decode_image,
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
    """Decode a picture or clip to its training size, all frames alike and one after the other: never more of them than
    the sample has are in memory, in its size. Raises ImageFileError, which names the file."""
    frames = [_cut(frame, geometry, item) for frame in _own_frames(item, with_alpha)]  # [H, W, 3 or 4]
    alpha = _stacked([alpha_to_mask(frame) for frame in frames]) if with_alpha else None
    colors = [frame[..., :3] for frame in frames]
    return Pixels(_stacked(colors if color is None else [change_color(frame, color) for frame in colors]), alpha)


def _own_frames(item: ImageItem, with_alpha: bool) -> Iterator[np.ndarray]:
    if item.clip is None:
        yield from decode_frames(item.absolute_path, item.frames, with_alpha=with_alpha)
    else:
        clip = item.clip
        yield from frames_of(item.absolute_path, clip.frame_numbers(), rate=clip.file_rate, with_alpha=with_alpha)


def _cut(frame: np.ndarray, geometry: Geometry, item: ImageItem) -> np.ndarray:
    """A frame at its training size. One of another size than the first covers the bucket by itself."""
    size = (frame.shape[1], frame.shape[0])
    if item.clip is not None and size != item.image_size:
        geometry = _covering(size, geometry.bucket)
    return resize_and_crop(frame, geometry.resized, geometry.bucket, geometry.offset, item.subset.resize_interpolation)


def _covering(size: Size, bucket: Size) -> Geometry:
    resized = cover_size(size, bucket)
    return Geometry(resized, bucket, centre_offset(resized, bucket))


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


# ---- masks and control pictures --------------------------------------------------------------------------------------

def read_pictures(item: ImageItem, geometry: Geometry, names: Collection[str]) -> dict[str, np.ndarray]:
    """What lies beside a sample, of those names (CONDITIONING_IMAGES, CONDITIONING_ALPHA and the same with numbers):
    its mask or control pictures [h, w, 3] uint8, of a clip [F, h, w, 3], and their alpha channels [h, w] or [F, h, w]
    in 0..1. Not mirrored."""
    found: dict[str, np.ndarray] = {}
    for number in range(1 if item.cond_path is not None else len(item.control_paths)):
        colors, alpha = numbered(CONDITIONING_IMAGES, number), numbered(CONDITIONING_ALPHA, number)
        if colors not in names and alpha not in names:
            continue
        frames = [
            _cut_beside(frame, geometry, item, number) for frame in _frames_beside(item, number, alpha in names)
        ]
        pixels = _stacked(frames)  # [h, w, C] or [F, h, w, C]
        if colors in names:
            found[colors] = pixels[..., :3]
        if alpha in names:
            found[alpha] = pixels[..., 3].astype(np.float32) / 255
    return found


def _frames_beside(item: ImageItem, number: int, with_alpha: bool) -> Iterator[np.ndarray]:
    path = item.control_paths[number] if item.cond_path is None else item.cond_path
    if item.clip is None:
        yield decode_image(path, with_alpha=with_alpha)
    else:
        control = item.control_clip
        assert control is not None
        yield from frames_of(path, control.frame_numbers(item.clip), rate=control.file_rate, with_alpha=with_alpha)


def _cut_beside(frame: np.ndarray, geometry: Geometry, item: ImageItem, number: int) -> np.ndarray:
    """Scaled and cropped exactly like the image, where both have one size; other control pictures cover their own
    bucket and are cut in the middle. ImageFileError for a mask of another size."""
    size = (frame.shape[1], frame.shape[0])
    if item.cond_path is not None:
        check_conditioning_size(item.cond_path, size, item.image_size)
    wanted = geometry.bucket if item.cond_path is not None or item.clip is not None else item.control_sizes[number]
    if size != item.image_size or wanted != geometry.bucket:
        geometry = _covering(size, wanted)
    return resize_and_crop(frame, geometry.resized, geometry.bucket, geometry.offset, item.subset.resize_interpolation)


def picture_tensors(pictures: Mapping[str, np.ndarray], flipped: bool = False) -> dict[str, torch.Tensor]:
    """Pictures as `read_pictures` gives them: colours [3, ..., h, w] in -1..1, alpha [1, ..., h, w] in 0..1, mirrored
    when `flipped`."""

    def tensor(name: str) -> torch.Tensor:
        is_alpha = name.startswith(CONDITIONING_ALPHA)
        return mask_tensor(pictures[name], flipped)[None] if is_alpha else image_tensor(pictures[name], flipped)

    return {name: tensor(name) for name in pictures}
