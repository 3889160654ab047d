"""Buckets: which sizes there are, which one an image takes, and how it is resized and cropped to it. Pure functions.

Sizes are (width, height); clips of one size and length share a bucket. Buckets are chosen by the absolute difference of
the ratios width/height; this judges tall images more coarsely than wide ones, and is kept because caches and published
bucket lists depend on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.core.keyed_random import keyed_random
from library.dataset.area_buckets import area_buckets, control_bucket, on_grid
from library.dataset.items import DatasetParams, ImageItem
from library.dataset.native_sizes import NativeSizes
from library.dataset.plan import BucketList
from library.families.latents import Bucket

Size = tuple[int, int]

CROP_WARNING = 0.4
"""part of the resized image that may be cut away before it is mentioned"""
UPSCALE_WARNING = 2.5
"""enlargement that may happen before it is mentioned"""
WORST_SHOWN = 5


def make_bucket_resolutions(max_reso: Size, min_size: int, max_size: int, step: int) -> list[Size]:
    """All sizes with sides that are multiples of `step` within the limits and no more pixels than `max_reso`, sorted.

    Mirrored entries are added from both sides, so that a width may come with several heights.
    """
    area = max_reso[0] * max_reso[1]
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)}
    for width in range(min_size, max_size + 1, step):
        height = min(max_size, (area // width) // step * step)
        if height >= min_size:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def effective_limits(min_reso: int, max_reso: int, step: int) -> tuple[int, int]:
    """The bucket limits on the grid: the lower one rounded down, but to one step at least, the upper one rounded up."""
    return max(min_reso // step, 1) * step, -(-max_reso // step) * step


def cover_size(size: Size, bucket: Size) -> Size:
    """The size to which an image is scaled, ratio kept, so that it just covers the bucket."""
    (width, height), (bucket_w, bucket_h) = size, bucket
    scale = bucket_h / height if width / height > bucket_w / bucket_h else bucket_w / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def centre_offset(resized: Size, bucket: Size) -> Size:
    """(left, top) of the centre crop inside the resized image."""
    return (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2


def crop_ltrb(resized: Size, bucket: Size, offset: Size) -> tuple[int, int, int, int]:
    """The crop as it is stored with a sample: left and top are what is cut there, right and bottom the bucket's size
    minus what is cut on that side, so that `bucket_w - right` is the left margin of the mirrored sample.

    1200x800 in bucket 1216x832 (resized 1248x832, offset (16, 0)) gives (16, 0, 1200, 832).
    """
    (left, top), (bucket_w, bucket_h) = offset, bucket
    return left, top, bucket_w - (resized[0] - bucket_w - left), bucket_h - (resized[1] - bucket_h - top)


@dataclass(frozen=True)
class BucketChoice:
    """How one image gets its training size: scale to `resized_size`, crop `bucket_reso` at `crop_offset` (left,
    top)."""

    bucket_reso: Size
    resized_size: Size
    crop_offset: Size
    crop_ltrb: tuple[int, int, int, int]
    ar_error: float
    """bucket width/height - image width/height"""


class BucketSelector:
    """Chooses the bucket of an image. Without buckets the only one is the resolution."""

    def __init__(
        self,
        resolution: Size,
        *,
        enable_bucket: bool = True,
        min_bucket_reso: int = 256,
        max_bucket_reso: int = 1024,
        bucket_reso_steps: int = 64,
        bucket_no_upscale: bool = False,
        bucket_rule: str = "steps",
        native: NativeSizes | None = None,
    ) -> None:
        self.resolution = resolution
        self.rule = bucket_rule
        self.native = native
        self.enable_bucket = enable_bucket
        self.no_upscale = bucket_no_upscale
        self.step = bucket_reso_steps
        self.min_reso, self.max_reso = effective_limits(min_bucket_reso, max_bucket_reso, bucket_reso_steps)
        if native is not None:
            self.predefined = []
        elif not enable_bucket:
            self.predefined = [resolution]
        elif bucket_rule == "area":
            self.predefined = area_buckets(resolution, self.step)
        elif bucket_no_upscale:
            self.predefined = []
        else:
            self.predefined = make_bucket_resolutions(resolution, self.min_reso, self.max_reso, self.step)

    @classmethod
    def of(cls, params: DatasetParams) -> BucketSelector:
        return cls(
            params.resolution,
            enable_bucket=params.enable_bucket,
            min_bucket_reso=params.min_bucket_reso,
            max_bucket_reso=params.max_bucket_reso,
            bucket_reso_steps=params.bucket_reso_steps,
            bucket_no_upscale=params.bucket_no_upscale,
            bucket_rule=params.bucket_rule,
            native=params.native,
        )

    def select(self, size: Size, frames: int = 1) -> BucketChoice | None:
        """The bucket of an image of this size, or of a clip of so many frames; None when a side would be shorter than
        one step (no-upscale and native sizes only)."""
        if self.native is not None:
            bucket = self.native.size_of(size, frames)
            if bucket is None:
                return None
            resized = size if bucket == self.native.floored(size) else cover_size(size, bucket)
        elif self.enable_bucket and self.rule == "area":
            bucket = self._own_or_nearest(size)
            if 0 in bucket:
                return None
            resized = cover_size(size, bucket)
        elif self.enable_bucket and self.no_upscale:
            resized = self._shrunk(size)
            bucket = (resized[0] // self.step * self.step, resized[1] // self.step * self.step)
            if 0 in bucket:
                return None
        else:
            bucket = self._nearest(size)
            resized = cover_size(size, bucket)
        offset = centre_offset(resized, bucket)
        error = bucket[0] / bucket[1] - size[0] / size[1]
        return BucketChoice(bucket, resized, offset, crop_ltrb(resized, bucket, offset), error)

    def _nearest(self, size: Size) -> Size:
        if size in self.predefined:
            return size
        ratio = size[0] / size[1]
        return min(self.predefined, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))

    def _own_or_nearest(self, size: Size) -> Size:
        """By the area rule. What would be enlarged keeps its size with no-upscale, as far as the grid allows."""
        if self.no_upscale and size[0] * size[1] <= self.resolution[0] * self.resolution[1]:
            return on_grid(size[0], self.step), on_grid(size[1], self.step)
        return self._nearest(size)

    def _shrunk(self, size: Size) -> Size:
        """Size of an image after it is made small enough for the area of the resolution; small images stay as they are.

        One side is put on the grid and the other follows; of the two ways the one that keeps the ratio better is taken.
        """
        width, height = size
        area = self.resolution[0] * self.resolution[1]
        if width * height <= area:
            return size
        ratio = width / height
        fit_w = math.sqrt(area * ratio)
        fit_h = area / fit_w
        by_width = (self._on_grid(fit_w), self._on_grid(self._on_grid(fit_w) / ratio))
        by_height = (self._on_grid(self._on_grid(fit_h) * ratio), self._on_grid(fit_h))
        if _ratio_error(by_width, ratio) < _ratio_error(by_height, ratio):
            return by_width[0], int(by_width[0] / ratio + 0.5)
        return int(by_height[1] * ratio + 0.5), by_height[1]

    def _on_grid(self, length: float) -> int:
        rounded = int(length + 0.5)
        return rounded - rounded % self.step


def _ratio_error(size: Size, ratio: float) -> float:
    return abs(size[0] / size[1] - ratio) if size[1] else math.inf


def balance_regularization(training_repeats: int, reg_repeats: Sequence[int], *, seed: int) -> list[int]:
    """How often each regularisation image appears, so that they are as many as the training samples. 0 = not used.

    Images are registered with their own repeats until there are enough; if all together are too few, one repeat at a
    time is added, going round. When not all are needed, which ones are used is drawn with the seed; otherwise nothing
    is random.
    """
    order = list(range(len(reg_repeats)))
    if sum(reg_repeats) > training_repeats:
        keyed_random(seed, "choice of regularisation images").shuffle(order)
    order = [index for index in order if reg_repeats[index] > 0]
    counts = [0] * len(reg_repeats)
    total = 0
    for index in order:
        if total >= training_repeats:
            break
        counts[index] = reg_repeats[index]
        total += reg_repeats[index]
    position = 0
    while order and total < training_repeats:
        counts[order[position % len(order)]] += 1
        total += 1
        position += 1
    return counts


@dataclass(frozen=True)
class BucketAssignment:
    """The buckets of one dataset. `repeats[i]` is how often item i appears in an epoch (0: skipped or not needed)."""

    buckets: tuple[BucketList, ...]
    repeats: tuple[int, ...]
    too_small: tuple[int, ...]
    """items that no bucket fits"""
    bucket_info: dict[str, Any] | None
    """as recorded in the metadata: {"buckets": {i: {"resolution", "count"}}, "mean_img_ar_error"}; None without
    buckets"""
    warnings: tuple[str, ...]

    @property
    def num_batches(self) -> int:
        """Batches of an epoch with one process."""
        return sum(-(-len(bucket.samples) // bucket.batch_size) for bucket in self.buckets)


def assign_buckets(
    items: Sequence[ImageItem], params: DatasetParams, *, dataset: int = 0, seed: int = 0, finest_step: int = 1
) -> BucketAssignment:
    """Give every item its bucket (sets `bucket_reso` and `resized_size`) and list the samples of each bucket with
    repeats.

    `dataset` is the index in the group, `seed` decides which regularisation images are used, `finest_step` is what
    bucket sides of the model must be a multiple of. Items too small for a bucket are left out and named in the
    warnings.
    """
    selector = BucketSelector.of(params)
    by_size = {size: selector.select(*size) for size in {(item.image_size, item.frames) for item in items}}
    choices = [by_size[item.image_size, item.frames] for item in items]
    for item, choice in zip(items, choices):
        if choice is not None:
            item.bucket_reso, item.resized_size = choice.bucket_reso, choice.resized_size
            item.control_sizes = _control_sizes(item, finest_step)
    repeats, notes = _repeats(items, choices, seed)

    samples: dict[Bucket, list[int]] = {}
    for index, choice in enumerate(choices):
        if choice is not None and repeats[index]:
            samples.setdefault(items[index].bucket, []).extend([index] * repeats[index])
    buckets = tuple(
        BucketList(dataset, bucket.key, tuple(samples[bucket]), params.batch_size) for bucket in sorted(samples)
    )
    too_small = tuple(index for index, choice in enumerate(choices) if choice is None)
    warnings = [
        *notes,
        *_small_warnings(items, too_small, params),
        *_quality_warnings(items, choices, params, finest_step),
    ]
    return BucketAssignment(buckets, tuple(repeats), too_small, bucket_info(buckets, choices, params), tuple(warnings))


def _control_sizes(item: ImageItem, step: int) -> tuple[Size, ...]:
    if item.clip is not None:  # the control of a clip goes with it, frame by frame
        return (item.bucket_reso,) * len(item.control_paths)
    subset = item.subset
    return tuple(
        control_bucket(
            size, item.bucket_reso, step, no_resize=subset.no_resize_control, resolution=subset.control_resolution
        )
        for size in item.control_image_sizes
    )


def _repeats(
    items: Sequence[ImageItem], choices: Sequence[BucketChoice | None], seed: int
) -> tuple[list[int], list[str]]:
    """How often each item appears, regularisation balanced, and what is to be said about it."""
    repeats = [item.num_repeats if choice is not None else 0 for item, choice in zip(items, choices)]
    reg = [index for index, item in enumerate(items) if item.is_reg]
    if not reg:
        return repeats, []
    total = sum(count for item, count in zip(items, repeats) if not item.is_reg)
    offered = [repeats[index] for index in reg]
    balanced = balance_regularization(total, offered, seed=seed)
    for index, count in zip(reg, balanced):
        repeats[index] = count
    if sum(offered) <= total:
        return repeats, []
    unused = sum(1 for count in balanced if count == 0)
    return repeats, [
        f"{sum(offered)} regularisation samples are offered for {total} training samples: {unused} regularisation "
        "images are not used"
    ]


def bucket_info(
    buckets: Sequence[BucketList], choices: Sequence[BucketChoice | None], params: DatasetParams
) -> dict[str, Any] | None:
    """The record of the buckets for the metadata; the error is the mean over images, repeats not counted. None where
    there are no buckets, or as many as pictures."""
    if not params.enable_bucket or params.native is not None:
        return None
    errors = [abs(choice.ar_error) for choice in choices if choice is not None]
    return {
        "buckets": {i: {"resolution": bucket.bucket, "count": len(bucket.samples)} for i, bucket in enumerate(buckets)},
        "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0,
    }


def _small_warnings(items: Sequence[ImageItem], too_small: Sequence[int], params: DatasetParams) -> list[str]:
    if not too_small:
        return []
    shown = ", ".join(
        f"{items[index].absolute_path} ({_wh(items[index].image_size)})" for index in too_small[:WORST_SHOWN]
    )
    more = f" and {len(too_small) - WORST_SHOWN} more" if len(too_small) > WORST_SHOWN else ""
    if params.native is not None:
        return [
            f"images left out: {len(too_small)}, of which one side is shorter than {params.native.step} px, the step of"
            f" sizes: {shown}{more}"
        ]
    return [
        f"images left out: {len(too_small)}, of which one side would be shorter than one bucket step "
        f"({params.bucket_reso_steps} px)"
        f" at the area of {_wh(params.resolution)}, and bucket_no_upscale is on: {shown}{more}"
    ]


def _quality_warnings(
    items: Sequence[ImageItem], choices: Sequence[BucketChoice | None], params: DatasetParams, finest_step: int
) -> list[str]:
    """The images that lose most by the crop, with the setting that cuts them, and those that are enlarged most."""
    cuts, scales = [], []
    for item, choice in zip(items, choices):
        if choice is None:
            continue
        resized_w, resized_h = choice.resized_size
        cut = cut_of(choice)
        scale = max(resized_w / item.image_size[0], resized_h / item.image_size[1])
        if cut > CROP_WARNING:
            cuts.append(
                (
                    cut,
                    f"{item.absolute_path} ({_wh(item.image_size)} in {_wh(choice.bucket_reso)}: {cut:.0%} cut)",
                    item.image_size,
                )
            )
        if scale > UPSCALE_WARNING:
            scales.append(
                (
                    scale,
                    f"{item.absolute_path} ({_wh(item.image_size)} in {_wh(choice.bucket_reso)}: x{scale:.1f})",
                    None,
                )
            )
    lines = []
    for found, what in ((cuts, "lose more than %d%% of their area to the crop" % (CROP_WARNING * 100)),
                        (scales, f"are enlarged more than {UPSCALE_WARNING} times")):
        if found:
            worst = sorted(found, key=lambda entry: entry[:2], reverse=True)[:WORST_SHOWN]
            reasons = dict.fromkeys(
                cutting_setting(size, params, finest_step) for _, _, size in worst if size is not None
            )
            lines.append(
                "; ".join(
                    (f"{len(found)} images {what}; the worst: {', '.join(text for _, text, _ in worst)}", *reasons)
                )
            )
    return lines


def cut_of(choice: BucketChoice) -> float:
    """The part of the resized image that is cut away."""
    (bucket_w, bucket_h), (resized_w, resized_h) = choice.bucket_reso, choice.resized_size
    return 1 - bucket_w * bucket_h / (resized_w * resized_h)


def cutting_setting(size: Size, params: DatasetParams, finest_step: int = 1) -> str:
    """The bucket setting because of which an image of this size is cut, with a value that cuts little. `finest_step`:
    what bucket_reso_steps must be a multiple of."""
    if params.native is not None:
        return f"the reason is the step of sizes, {params.native.step} px"
    if not params.enable_bucket:
        return f"the reason is enable_bucket = false, which crops every image to {_wh(params.resolution)}; write enable_bucket = true"
    area, ratio, step = params.resolution[0] * params.resolution[1], max(size) / min(size), params.bucket_reso_steps
    limits = {
        "max_bucket_reso": int(-(-math.sqrt(area * ratio) // step)) * step,
        "min_bucket_reso": max(int(math.sqrt(area / ratio) // step), 1) * step
    }
    finer = {"bucket_reso_steps": max(step // 4 // finest_step, 1) * finest_step}
    ways = [{name: value} for name, value in limits.items()] + [limits]
    for change in [finer] if params.bucket_no_upscale or params.bucket_rule == "area" else [*ways, finer, {**limits, **finer}]:
        choice = BucketSelector.of(dataclasses.replace(params, **change)).select(size)
        if choice is not None and cut_of(choice) <= CROP_WARNING:
            are = " and ".join(f"{name} = {getattr(params, name)}" for name in change)
            better = " and ".join(str(value) if name in limits else "a smaller one" for name, value in change.items())
            return f"the reason is {are} ({better} would do)"
    return "no setting of the buckets helps such narrow images"


def _wh(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
