"""What datasets and subsets read, by their source keys; settings of clips, control pictures and single frames; which of
them a family has no use for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from library.dataset.architectures import DataArchitecture
from library.dataset.area_buckets import area_problem
from library.dataset.clips.settings import ClipSettings, OneFrameSettings
from library.dataset.config_reading import BAD, ConfigTables, DatasetTables, ProblemList, Scope, Table
from library.dataset.config_schema import BUCKET_KEYS, KEYS, MEDIA, NOT_FLAT, SOURCE_KEYS
from library.dataset.items import DatasetParams, SubsetParams
from library.families.registry import records

SUBSET_SOURCES = ("image_dir", *SOURCE_KEYS, "metadata_file")
FLAT_DEFAULTS: dict[str, Any] = {"resolution": (960, 544), "caption_extension": None}
"""of datasets without subsets, where they are others"""
FLAT_BUCKETS = "area"
CONTROL_KEYS = ("control_directory", "control_resolution", "no_resize_control")
ONE_FRAME_KEYS = tuple(field.name for field in dataclasses.fields(OneFrameSettings))
CLIP_KEYS = tuple(field.name for field in dataclasses.fields(ClipSettings))


class FlatScope(Scope):
    """Looks a key of a dataset without subsets up: dataset, general, what was written on the command line, default."""

    def __init__(self, explicit: frozenset[str], scope: Scope) -> None:
        super().__init__(scope.options, *scope.tables)
        self.explicit = explicit

    def takes_option(self, name: str) -> bool:
        return name not in NOT_FLAT and super().takes_option(name)

    def get(self, name: str) -> Any:
        written = {KEYS[name].option, name, "caption_extention" if name == "caption_extension" else name}
        if name in FLAT_DEFAULTS and not self.written_at(name) and not written & self.explicit:
            return FLAT_DEFAULTS[name]
        return super().get(name)


def learns_videos(architecture: DataArchitecture) -> bool:
    return architecture.clips is not None and architecture.clips.fps is not None


def sources_of(table: Table) -> list[str]:
    """The source keys that a table has; `image_dir` of a metadata file says where its images are, and is none."""
    found = [name for name in SUBSET_SOURCES if name in table.values]
    return [name for name in found if name != "image_dir" or "metadata_file" not in found]


def media_of(table: Table) -> str:
    """image or video."""
    return "video" if any(KEYS[name].media == "video" for name in sources_of(table)) else "image"


def _media(table: Table) -> set[str]:
    """Those that its keys may be for: all where the source is not known."""
    return {KEYS[name].media or "image" for name in sources_of(table)} or set(MEDIA)


def check_sources(dataset: DatasetTables, architecture: DataArchitecture, problems: ProblemList) -> None:
    """Every subset has one source, of a medium that the family learns, and keys that are for this medium."""
    for table in dataset.subsets:
        sources = sources_of(table)
        if dataset.is_flat and not sources:
            problems.add(
                table.path, "missing",
                f"the dataset has no source; write one of {', '.join(SOURCE_KEYS)}, or give it [[datasets.subsets]]",
            )
        if len(sources) > 1:
            problems.add(
                table.path, "conflict",
                f"has {' and '.join(sources)}; one source is possible, give each a table of its own",
            )
        if media_of(table) == "video" and not learns_videos(architecture):
            problems.add(table.where(next(name for name in sources if KEYS[name].media == "video")), "conflict", (
                f"{architecture.name} learns pictures, not videos; train a family that does"
                f" ({', '.join(video_families())}), or write image_directory"
            ))  # fmt: skip
    held_by = [_media(table) for table in dataset.subsets]
    for table, held in [(dataset.table, set().union(*held_by)), *zip(dataset.subsets, held_by)]:
        for name in table.values:
            if KEYS[name].media and KEYS[name].media not in held and name not in SOURCE_KEYS:
                there = " and ".join(MEDIA[medium] for medium in sorted(held))
                message = f"the key is for {MEDIA[KEYS[name].media]}; here are {there}"
                problems.add(table.where(name), "conflict", message)


def video_families() -> list[str]:
    """Titles of the families that learn from videos."""
    found = (record for record in records().values() if record.clips is not None and record.clips.fps is not None)
    return [record.title for record in found]


def check_area(scope: Scope, architecture: DataArchitecture, problems: ProblemList) -> None:
    """With buckets of one area: there is one, which is two bucket steps wide and high at least."""
    resolution = scope.get("resolution")
    problem = None if resolution is BAD else area_problem(resolution, architecture.bucket_step)
    if problem is not None:
        problems.add(scope.where("resolution"), "out_of_range", f"{problem} for {architecture.name}")


def source_settings(scope: Scope, architecture: DataArchitecture) -> dict[str, Any]:
    """Fields of SubsetParams that hang on several keys."""
    table = scope.tables[0]
    fields: dict[str, Any] = {}
    if "image_directory" in table.values:
        fields["image_dir"] = scope.get("image_directory")
    if media_of(table) == "video":
        fields["clips"] = ClipSettings(**_written(scope, CLIP_KEYS))
    elif any(scope.written_at(name) for name in ONE_FRAME_KEYS):
        fields["one_frame"] = OneFrameSettings(**_written(scope, ONE_FRAME_KEYS))
    fields["control_count"] = _control_count(fields, architecture)
    size = scope.get("fp_latent_window_size")
    return fields if size is BAD else {**fields, "window_size": size}


def _control_count(fields: Mapping[str, Any], architecture: DataArchitecture) -> int | None:
    """Control files of each picture or video; single frames have one for each time of a reference."""
    facts = architecture.clips
    if facts is None or facts.controls == 0:
        return 0
    one_frame = fields.get("one_frame")
    if facts.one_frame and one_frame is not None and one_frame.fp_1f_clean_indices:
        return len(one_frame.fp_1f_clean_indices)
    return 1 if "clips" in fields else facts.controls


def _written(scope: Scope, names: Sequence[str]) -> dict[str, Any]:
    values = {name: scope.get(name) for name in names}
    return {name: value for name, value in values.items() if value is not BAD}


def check_targets(
    scope: Scope, subset: SubsetParams, architecture: DataArchitecture, problems: ProblemList
) -> None:
    """Settings of what is learned of a picture or video, against each other and the family."""
    if subset.multiple_target and not (architecture.clips is not None and architecture.clips.layers):
        problems.add(
            scope.where("multiple_target"), "conflict",
            f"{architecture.name} learns one picture of each caption, no layers; remove the key, and the layers from"
            " the folder",
        )
    if subset.clips is None:
        return
    clips = subset.clips.in_effect(architecture.latents.temporal_stride)
    if clips.frame_extraction == "chunk" and 1 in clips.target_frames:
        where = "frame_extraction" if scope.written_at("frame_extraction") else "target_frames"
        written = list(subset.clips.target_frames)
        rounded = "" if written == list(clips.target_frames) else f" ({written} rounded down to what the VAE takes)"
        problems.add(
            scope.where(where), "conflict",
            f"chunk cuts a video into clips of target_frames, which are {list(clips.target_frames)}{rounded}: every"
            " frame would be a sample; take what gives 1 out of target_frames, or use slide with frame_stride",
        )


def told(scope: Scope, subset: SubsetParams, architecture: DataArchitecture) -> list[str]:
    """Settings that do something else than they say, or nothing: one line each."""
    lines = [] if subset.clips is None else _told_of_clips(scope, subset.clips, architecture)
    return [f"{subset.label}: {line}" for line in lines + _unread(scope, subset, architecture)]


def _told_of_clips(scope: Scope, settings: ClipSettings, architecture: DataArchitecture) -> list[str]:
    stride, lines = architecture.latents.temporal_stride, []
    clips = settings.in_effect(stride)
    odd = sorted(set(settings.target_frames) - set(clips.target_frames))
    if odd:
        lines.append(
            f"target_frames {odd} are no multiple of {stride} and 1, as the VAE of {architecture.name} needs; clips of"
            f" {list(clips.target_frames)} frames are used"
        )
    if clips.frame_extraction != settings.frame_extraction:
        lines.append("frame_extraction uniform with frame_sample 1 takes the beginning, as head does")
    if clips.frame_extraction == "full" and scope.written_at("target_frames"):
        lines.append("target_frames has no effect with frame_extraction full, whose limit is max_frames")
    idle = {"frame_stride": "slide", "frame_sample": "uniform", "max_frames": "full"}
    return lines + [
        f"{name} has no effect with frame_extraction {clips.frame_extraction}; it is for {mode}"
        for name, mode in idle.items() if scope.written_at(name) and mode != settings.frame_extraction
    ]


def _unread(scope: Scope, subset: SubsetParams, architecture: DataArchitecture) -> list[str]:
    facts, lines = architecture.clips, []
    unread = {name: subset.control_count == 0 for name in CONTROL_KEYS}
    unread |= {name: facts is None or not facts.one_frame for name in ONE_FRAME_KEYS}
    unread["fp_latent_window_size"] = facts is None or not facts.sections
    names = [name for name, is_unread in unread.items() if is_unread and scope.written_at(name)]
    for name in ("cache_info", "prefer_json"):
        if getattr(subset, name) and subset.is_listed:
            lines.append(f"{name} is for folders, and has no effect on a list")
    places = subset.one_frame.fp_1f_clean_indices if subset.one_frame is not None else None
    if places and facts is not None and facts.one_frame and subset.control_directory is None and not subset.is_listed:
        lines.append(
            "fp_1f_clean_indices are places of control pictures, and there is no control_directory: nothing is shown at"
            " these places"
        )
    if names:
        are = "is" if len(names) == 1 else "are"
        lines.append(f"{', '.join(names)} {are} nothing that {architecture.name} reads, and ignored")
    return lines


def idle_bucket_settings(tables: ConfigTables, explicit: frozenset[str]) -> list[str]:
    """A line on limits of buckets that are written for all datasets, none of which has a use for them."""
    names = [name for name in BUCKET_KEYS if name in explicit or name in tables.general.values]
    if not names or not tables.datasets or not all(dataset.is_flat for dataset in tables.datasets):
        return []
    have = "has" if len(names) == 1 else "have"
    return [f"{', '.join(names)} {have} no effect: datasets without subsets have buckets of all shapes of one area"]


def idle_beside_native(dataset: DatasetTables) -> list[str]:
    """A line on settings of buckets that a dataset has, where pictures keep their sizes."""
    names = [name for name in (*BUCKET_KEYS, "enable_bucket", "bucket_no_upscale") if name in dataset.table.values]
    if not names:
        return []
    return [
        f"{dataset.table.path}: {', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect with"
        " --navit_native_resolution: pictures keep their sizes"
    ]


def check_shared_caches(
    datasets: Sequence[DatasetParams], tables: Sequence[DatasetTables], architecture: DataArchitecture,
    problems: ProblemList,
) -> None:
    """Where a cache file holds one sample (safetensors), datasets do not share a folder; a JSONL file names one."""
    if not architecture.latents_suffix.endswith(".safetensors"):
        return
    first: dict[str, str] = {}
    for dataset, found in zip(datasets, tables, strict=True):
        for subset in dataset.subsets:
            table = next(table for table in found.subsets if table.path == subset.label)
            listed = subset.image_jsonl_file or subset.video_jsonl_file
            if found.is_flat and listed and "cache_directory" not in table.values:
                problems.add(
                    table.where("cache_directory"), "missing", f"the files of {listed} may lie anywhere; write"
                    " cache_directory, the folder of their caches"
                )
            folder = subset.cache_directory or subset.image_dir or subset.video_directory
            if folder is None:
                continue
            earlier = first.setdefault(os.path.realpath(folder), subset.label)
            if earlier != subset.label:
                problems.add(
                    table.where("cache_directory"), "conflict", f"the caches of {earlier} stand in {folder} too; write"
                    " cache_directory, another folder for each"
                )
