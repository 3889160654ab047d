"""Checks of settings against each other: sizes and buckets, augmentation and caches, captions and caches, folders used
twice."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from library.dataset import CachingOptions
from library.dataset.architectures import DataArchitecture
from library.dataset.bucket import effective_limits
from library.dataset.captions import random_caption_settings
from library.dataset.config_reading import BAD, ProblemList, Scope
from library.dataset.items import DatasetParams, SubsetParams


def check_resolution(scope: Scope, architecture: DataArchitecture, problems: ProblemList) -> None:
    """The resolution is there, and sizes are multiples of what the model family can take."""
    resolution, step = scope.get("resolution"), architecture.bucket_step
    label = scope.tables[0].path
    if resolution is None:
        message = "the dataset has no resolution; write resolution = 1024 (or [W, H]) or use --resolution"
        problems.add(f"{label}.resolution", "missing", message)
    elif resolution is not BAD and any(side % step for side in resolution):
        fitting = ", ".join(str(max(step, round(side / step) * step)) for side in resolution)
        problems.add(
            scope.where("resolution"),
            "out_of_range",
            f"is {resolution[0]}x{resolution[1]}; the sides must be multiples of {step} for {architecture.name}, e.g. "
            f"{fitting}",
        )
    steps = scope.get("bucket_reso_steps")
    if steps is not BAD and steps % step:
        problems.add(
            scope.where("bucket_reso_steps"), "out_of_range",
            f"is {steps}; {architecture.name} needs a multiple of {step}, e.g. 64"
        )


def checked_limits(scope: Scope, explicit: frozenset[str], problems: ProblemList) -> int | None:
    """With buckets on: check the limits against the resolution. Returns the upper limit in force, None when it stays.

    A maximum that nobody wrote follows the resolution; a written one below it is an error, like a minimum above it.
    """
    names = ("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
    resolution, enabled, low, high, steps = (scope.get(name) for name in names)
    if enabled is not True or resolution is None or resolution is BAD or steps is BAD:
        return None
    lowest, highest = effective_limits(1 if low is BAD else low, max(resolution) if high is BAD else high, steps)
    if lowest > min(resolution):
        if low is not BAD and low >= lowest:
            given = scope.written_at("min_bucket_reso") or "min_bucket_reso" in explicit
            reason, way_out = f"is {low}{'' if given else ' (when it is not given)'}", f"use {min(resolution)} or less"
        else:
            reason, way_out = f"is {lowest}, one bucket_reso_steps", "lower bucket_reso_steps"
        problems.add(
            scope.where("min_bucket_reso"), "conflict",
            f"{reason}, larger than the shorter side of the resolution ({min(resolution)}); {way_out}",
        )
    if high is BAD or highest >= max(resolution):
        return None
    if scope.written_at("max_bucket_reso") or "max_bucket_reso" in explicit:
        problems.add(
            scope.where("max_bucket_reso"),
            "conflict",
            f"is {high}, smaller than the longer side of the resolution ({max(resolution)}); use {max(resolution)} or "
            "more",
        )
        return None
    return effective_limits(1, max(resolution), steps)[1]

CACHE_BY_THEMSELVES = "; scripts of videos cache by themselves, unless --live_encoding is given"


def check_subset(
    scope: Scope, subset: SubsetParams, dataset: DatasetParams, caching: CachingOptions, problems: ProblemList
) -> None:
    """Augmentations and random captions that cannot go with caches, buckets or masks."""

    def refuse(name: str, reason: str) -> None:
        where = scope.where(name)
        problems.add(where, "conflict", reason if subset.label in where else f"{reason} ({subset.label})")

    if dataset.kind == "CN" and subset.random_crop and not dataset.holds_control:
        refuse("random_crop", "cannot be used with conditioning_data_dir and --masked_loss; set it to false")
    if caching.caches_latents:
        for name in ("color_aug", "random_crop"):
            if getattr(subset, name):
                refuse(
                    name,
                    "changes the pixels each time and cannot be used with --cache_latents; set it to false or do not "
                    f"cache{CACHE_BY_THEMSELVES}",
                )
    if subset.face_crop_aug_range is not None and (dataset.enable_bucket or caching.caches_latents):
        other = "enable_bucket" if dataset.enable_bucket else "--cache_latents"
        refuse(
            "face_crop_aug_range",
            f"needs images that are cropped each time and cannot be used with {other}; use one of the two",
        )
    if caching.caches_text:
        for name in random_caption_settings(subset):
            refuse(
                name,
                "changes the caption each time and cannot be used with --cache_text_encoder_outputs; switch one of "
                f"them off{CACHE_BY_THEMSELVES}",
            )


def same_sources(
    subsets: Sequence[SubsetParams], paths: Sequence[str], problems: ProblemList, warnings: list[str]
) -> list[int]:
    """Indices of the subsets that repeat an earlier one: same folder or file however it is spelled, and same settings.

    With other settings it is a problem: which of them would count could not be seen.
    """
    first: dict[tuple, int] = {}
    repeated = []
    for index, subset in enumerate(subsets):
        source = _source(subset)
        if source is None:
            continue
        earlier = first.setdefault(source, index)
        if earlier == index:
            continue
        name, path = subset.source or ("", "")
        if _settings(subset) == _settings(subsets[earlier]):
            warnings.append(f"{paths[index]} is the same as {paths[earlier]} ({path}) and is ignored")
            repeated.append(index)
        else:
            problems.add(
                f"{paths[index]}.{name}",
                "conflict",
                f"{path} is used by {paths[earlier]} of this dataset too, with other settings; keep "
                "one of them",
            )
    return repeated


def _source(subset: SubsetParams) -> tuple | None:
    """What a subset reads, as resolved paths."""
    if subset.source is None:
        return None
    others = (subset.source[1], subset.conditioning_data_dir, subset.control_directory)
    return tuple(path and os.path.realpath(path) for path in others)


def _settings(subset: SubsetParams) -> SubsetParams:
    folder = os.path.realpath(subset.image_dir) if subset.image_dir else None
    return dataclasses.replace(
        subset, label="", image_dir=folder, metadata_file=None, image_jsonl_file=None, video_directory=None,
        video_jsonl_file=None, conditioning_data_dir=None, control_directory=None,
    )


def notices(datasets: Sequence[DatasetParams]) -> list[str]:
    """Settings in use whose effect is another one than in other trainers; one line each, for the log at start."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    lines = {
        "color_aug: gamma is applied to values 0..1, so brightness changes little": any(s.color_aug for s in subsets),
        "caption_separator: tags are joined with it again, not with a comma, and with the space that captions write "
        "behind it": any(s.caption_separator != "," for s in subsets),
        "enable_wildcard: the line of a caption is chosen first, then caption_prefix and caption_suffix are "
        "attached": any(s.enable_wildcard and (s.caption_prefix or s.caption_suffix) for s in subsets),
        "prefer_json: captions in JSON say by their categories what stays in place; keep_tokens and "
        "keep_tokens_separator count for other captions alone": any(
            s.reads_json and (s.keep_tokens or s.keep_tokens_separator) for s in subsets
        ),
        "keep_tokens_separator: it is taken out of every caption, also when tags are neither shuffled nor dropped": any(
            s.keep_tokens_separator for s in subsets
        ),
        "validation_split: every image is in one part only; the choice follows validation_seed, else --seed": any(
            d.validation_split > 0 or any(s.validation_split for s in d.subsets) for d in datasets
        ),
        "conditioning_data_dir: its pictures are scaled and cropped like their images, not squeezed to the bucket": any(
            d.kind == "CN" for d in datasets
        ),
        "enable_bucket and bucket_no_upscale count for videos as for pictures: without the first all are cropped to "
        "resolution, with the second none is enlarged": any(
            (not d.enable_bucket or d.bucket_no_upscale) and any(s.clips is not None for s in d.subsets)
            for d in datasets if d.bucket_rule == "area"
        ),
    }
    return [line for line, is_used in lines.items() if is_used]
