"""Buckets, images and their split as other code fills and reads them by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.core.keyed_random import keyed_random
from library.dataset.bucket import BucketSelector, centre_offset, cover_size, crop_ltrb
from library.dataset.datasources import DEFAULT_SPLIT_SEED, split_validation
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.media_utils import image_extensions

Size = tuple[int, int]


class ImageInfo(ImageItem):
    """An image with what caching strategies read and write; `image_size`, `bucket_reso` and `resized_size` are set by
    the caller."""

    def __init__(self, image_key: str, num_repeats: int, caption: str, is_reg: bool, absolute_path: str) -> None:
        super().__init__(image_key, absolute_path, caption, SubsetParams(is_reg=is_reg), (0, 0), num_repeats)


class BucketManager:
    """Sizes and the images in them. `max_reso` None: the sizes come from `set_predefined_resos`."""

    def __init__(self, no_upscale: bool, max_reso: Size | None, min_size: int, max_size: int, reso_steps: int) -> None:
        self.no_upscale = no_upscale
        self.max_reso = max_reso
        self.max_area = None if max_reso is None else max_reso[0] * max_reso[1]
        self.reso_steps = reso_steps
        self._selector = BucketSelector(
            max_reso or (max_size, max_size), min_bucket_reso=min_size, max_bucket_reso=max_size,
            bucket_reso_steps=reso_steps,
            bucket_no_upscale=no_upscale,
        )
        self.min_size, self.max_size = self._selector.min_reso, self._selector.max_reso
        self.predefined_resos: list[Size] = []
        self.resos: list[Size] = []
        self.reso_to_id: dict[Size, int] = {}
        self.buckets: list[list[Any]] = []

    def make_buckets(self) -> None:
        """The sizes of the limits."""
        self.set_predefined_resos(self._selector.predefined)

    def set_predefined_resos(self, resos: Sequence[Size]) -> None:
        self.predefined_resos = list(resos)
        self._selector.predefined = self.predefined_resos

    def add_if_new_reso(self, reso: Size) -> None:
        if reso not in self.reso_to_id:
            self.reso_to_id[reso] = len(self.resos)
            self.resos.append(reso)
            self.buckets.append([])

    def select_bucket(self, image_width: int, image_height: int) -> tuple[Size, Size, float]:
        """(size of the bucket, size to which the image is scaled, ratio of the bucket minus that of the image).
        ValueError for an image of which one side would be shorter than a step."""
        choice = self._selector.select((image_width, image_height))
        if choice is None:
            raise ValueError(f"an image of {image_width}x{image_height} fits no bucket with steps of {self.reso_steps}")
        self.add_if_new_reso(choice.bucket_reso)
        return choice.bucket_reso, choice.resized_size, choice.ar_error

    def add_image(self, reso: Size, image_or_info: Any) -> None:
        """Into a bucket that `select_bucket` or `add_if_new_reso` made."""
        self.buckets[self.reso_to_id[reso]].append(image_or_info)

    def sort(self) -> None:
        """By size."""
        order = sorted(self.resos)
        self.buckets = [self.buckets[self.reso_to_id[reso]] for reso in order]
        self.resos, self.reso_to_id = order, {reso: number for number, reso in enumerate(order)}

    def shuffle(self, seed: int = 0) -> None:
        """The images within each bucket; the same order for the same seed."""
        for reso, bucket in zip(self.resos, self.buckets):
            keyed_random(seed, "order of a bucket", *reso).shuffle(bucket)

    @staticmethod
    def get_crop_ltrb(bucket_reso: Size, image_size: Size) -> tuple[int, int, int, int]:
        """The centre crop of an image in a bucket, as it is stored with a sample (see
        library.dataset.bucket.crop_ltrb)."""
        resized = cover_size(image_size, bucket_reso)
        return crop_ltrb(resized, bucket_reso, centre_offset(resized, bucket_reso))


def split_train_val(
    paths: Sequence[str], sizes: Sequence[Size | None], is_training_dataset: bool, validation_split: float,
    validation_seed: int | None
) -> tuple[list[str], list[Size | None]]:
    """The part of the images (paths, sizes) that trains, or the part that validates."""
    seed = DEFAULT_SPLIT_SEED if validation_seed is None else validation_seed
    chosen = split_validation(paths, validation_split, seed)[0 if is_training_dataset else 1]
    return [paths[number] for number in chosen], [sizes[number] for number in chosen]


def glob_images_pathlib(dir_path: str | Path, recursive: bool) -> list[Path]:
    """Image files of a folder, sorted."""
    found, extensions = Path(dir_path).glob("**/*" if recursive else "*"), image_extensions()
    return sorted(path for path in found if path.suffix.lower() in extensions)
