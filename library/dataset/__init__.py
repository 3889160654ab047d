"""Options of the data side: which images, how they are bucketed, captioned and augmented, and what is cached."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.errors import Problems
from library.core.options import LARGEST_BATCH, LARGEST_SEED, LARGEST_SIDE, count_or_none, option

FOLDER_OPTIONS = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")
"""options that stand for a dataset configuration"""
INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


def parse_resolution(value: Any) -> tuple[int, int]:
    """(width, height) from "S", "W,H", S or [W, H]. Raises ArgumentTypeError, which names the right forms."""
    sides: list[Any] = []
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        if len(parts) <= 2 and all(re.fullmatch("[+-]?[0-9]+", part) for part in parts):
            sides = [int(parts[0]), int(parts[-1])]
    elif isinstance(value, (list, tuple)):
        sides = list(value)
    else:
        sides = [value, value]
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        raise argparse.ArgumentTypeError(f"resolution is {value!r}; use one number (1024) or width,height (1024,768)")
    return (sides[0], sides[1])


def parse_range(value: Any) -> tuple[float, float]:
    """(lo, hi) from "lo,hi" or [lo, hi]. Raises ArgumentTypeError."""
    parts = value.strip().strip("[]()").split(",") if isinstance(value, str) else value
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{value!r} is not a range; use two numbers, e.g. 1.0,3.0") from None
    return low, high


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Images, captions, buckets and augmentation"""

    dataset_config: Path | None = option(None, help="dataset configuration, .toml or .json")
    dataset_class: str | None = option(None, help="package.module.Class of an own dataset, instead of a configuration")
    train_data_dir: str | None = option(
        None, help="folder of N_name sub-folders with images (N = repeats), or the images of --in_json"
    )
    reg_data_dir: str | None = option(None, help="folder of N_name sub-folders with regularisation images")
    in_json: str | None = option(None, help="metadata file (.json or .jsonl) of the images in --train_data_dir")
    conditioning_data_dir: str | None = option(None, help="folder of masks (with --masked_loss) or control images")
    debug_dataset: bool = option(
        False, help="show what the data loader gives, with a sheet of pictures (dataset.png in --output_dir), and stop"
    )
    train_batch_size: int = option(1, help="samples of a batch, per process", most=LARGEST_BATCH)
    resolution: tuple[int, int] | None = option(
        None, convert=parse_resolution, metavar="W,H", help="training size: one number or width,height",
        most=LARGEST_SIDE
    )
    enable_bucket: bool = option(False, help="several sizes by aspect ratio instead of one crop for all")
    min_bucket_reso: int = option(256, help="shortest bucket side", most=LARGEST_SIDE)
    max_bucket_reso: int = option(
        1024, help="longest bucket side; when not written, it follows the resolution", most=LARGEST_SIDE
    )
    bucket_reso_steps: int = option(64, help="bucket sides are multiples of this", most=LARGEST_SIDE)
    bucket_no_upscale: bool = option(False, help="make buckets from the image sizes, never enlarging an image")
    cache_info: bool = option(False, help="keep captions and sizes of a folder in metadata_cache.json")
    shuffle_caption: bool = option(False, help="shuffle the tags of a caption at each use")
    caption_separator: str = option(",", help="text between tags")
    caption_extension: str = option(".caption", help="extension of caption files")
    caption_extention: str | None = option(None, help="old spelling of --caption_extension; wins when both are given")
    prefer_json: bool = option(
        False,
        help="a JSON file beside an image is its caption, with tags by category, before one of --caption_extension",
    )
    keep_tokens: int = option(0, help="tags at the start that are never shuffled or dropped")
    keep_tokens_separator: str = option(
        "", help="text that ends the fixed head of a caption, and starts its fixed tail"
    )
    secondary_separator: str | None = option(
        None, help="text replaced by the separator after shuffling: tags that stay together"
    )
    enable_wildcard: bool = option(False, help="captions of several lines and {a|b} alternatives")
    caption_prefix: str | None = option(None, help="text before every caption")
    caption_suffix: str | None = option(None, help="text after every caption")
    color_aug: bool = option(False, help="small random changes of hue or gamma")
    flip_aug: bool = option(False, help="mirror images at random")
    face_crop_aug_range: tuple[float, float] | None = option(
        None, convert=parse_range, metavar="LO,HI",
        help="crop around faces given by file names: side of the crop in face sizes"
    )
    random_crop: bool = option(False, help="crop at a random place instead of the centre")
    token_warmup_min: int = option(1, help="tags used at the first step of the token warm-up")
    token_warmup_step: float = option(0, help="steps until all tags are used; below 1: part of all steps")
    alpha_mask: bool = option(False, help="alpha channel of the images weighs the loss")
    dataset_repeats: int = option(1, help="repeats of the images of a metadata file")
    caption_dropout_rate: float = option(0.0, help="probability that a caption is left empty")
    caption_dropout_every_n_epochs: int = option(0, help="all captions are empty in every n-th epoch; 0 = never")
    caption_tag_dropout_rate: float = option(0.0, help="probability that a tag is left out")
    resize_interpolation: str | None = option(
        None, choices=INTERPOLATIONS, help="default: area to shrink, lanczos to enlarge"
    )
    validation_split: float = option(0.0, help="part of the images that is kept for validation, 0..1")
    validation_seed: int | None = option(
        None, help="seed of the choice of validation images; default: --seed", most=LARGEST_SEED
    )
    masked_loss: bool = option(False, help="weigh the loss with the masks of conditioning_data_dir")
    prior_loss_weight: float = option(1.0, help="weight of the loss of regularisation images")
    skip_image_resolution: tuple[int, int] | None = option(
        None, convert=parse_resolution, metavar="W,H", most=LARGEST_SIDE,
        help="leave out images with no more pixels than this: one number or width,height",
    )
    check_images: bool = option(False, help="read every image in full at the start, not only its header")
    skip_bad_images: bool = option(False, help="go on without images that cannot be read, instead of stopping")
    fail_on_missing_captions: bool = option(False, help="stop when an image has neither a caption nor class_tokens")

    def __post_init__(self) -> None:
        problems = Problems()
        check_minimum(problems, self, 1, "train_batch_size", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
        check_minimum(
            problems, self, 0, "keep_tokens", "caption_dropout_every_n_epochs", "token_warmup_min", "token_warmup_step",
            "dataset_repeats", "prior_loss_weight",
        )
        for name in ("caption_dropout_rate", "caption_tag_dropout_rate", "validation_split"):
            if not 0 <= getattr(self, name) <= 1:
                problems.add(f"--{name} is {getattr(self, name)}; use a number from 0 to 1")
        sources = ("dataset_config", *FOLDER_OPTIONS)
        given = [f"--{name}" for name in sources if getattr(self, name) is not None]
        if self.dataset_class is not None and given:
            problems.add(
                f"--dataset_class makes its own batches and cannot be used with {', '.join(given)}; keep one of them"
            )
        for name in ("resolution", "skip_image_resolution"):
            size = getattr(self, name)
            if size is not None and min(size) < 1:
                problems.add(f"--{name} is {size[0]},{size[1]}; both sides must be at least 1")
        if self.face_crop_aug_range is not None and not 0 < self.face_crop_aug_range[0] <= self.face_crop_aug_range[1]:
            problems.add(
                f"--face_crop_aug_range is {self.face_crop_aug_range}; use two numbers with 0 < lo <= hi, e.g. 1.0,3.0"
            )
        if self.resize_interpolation is not None and self.resize_interpolation not in INTERPOLATIONS:
            problems.add(
                f"--resize_interpolation is {self.resize_interpolation!r}; use one of {', '.join(INTERPOLATIONS)}"
            )
        problems.raise_if_any()

    @property
    def effective_caption_extension(self) -> str:
        """The extension that counts: the old spelling of the option wins when it is given."""
        return self.caption_extention if self.caption_extention is not None else self.caption_extension


def batch_size_or_one(text: str | int) -> int:
    """A batch size; 0 is 1, as front ends write it. ValueError for other texts."""
    return int(text) or 1


@dataclass(frozen=True, kw_only=True)
class CachingOptions:
    """Caches of latents and text encoder outputs"""

    cache_latents: bool = option(False, help="encode the images once, before training")
    cache_latents_to_disk: bool = option(
        False, help="keep the latents in files next to the images (implies --cache_latents)"
    )
    vae_batch_size: int = option(
        1, help="images per batch while latents are cached; 0 = 1", convert=batch_size_or_one, most=LARGEST_BATCH
    )
    skip_cache_check: bool = option(False, help="use existing cache files without looking into them")
    cache_text_encoder_outputs: bool = option(False, help="encode the captions once, before training")
    cache_text_encoder_outputs_to_disk: bool = option(
        False, help="keep the text encoder outputs in files next to the images (implies --cache_text_encoder_outputs)"
    )
    text_encoder_batch_size: int | None = option(
        None, help="captions per batch while they are cached; default: the dataset's batch size", convert=count_or_none,
        most=LARGEST_BATCH
    )

    def __post_init__(self) -> None:
        problems = Problems()
        check_minimum(problems, self, 1, "vae_batch_size")
        if self.text_encoder_batch_size is not None:
            check_minimum(problems, self, 1, "text_encoder_batch_size")
        problems.raise_if_any()

    @property
    def caches_latents(self) -> bool:
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def caches_text(self) -> bool:
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk


def check_minimum(problems: Problems, options: Any, minimum: float, *names: str) -> None:
    """Note every named option that is below `minimum`."""
    for name in names:
        value = getattr(options, name)
        if value < minimum:
            problems.add(f"--{name} is {value}; use {minimum} or more")


__all__ = [
    "FOLDER_OPTIONS",
    "INTERPOLATIONS",
    "CachingOptions",
    "DatasetOptions",
    "check_minimum",
    "parse_range",
    "parse_resolution",
]
