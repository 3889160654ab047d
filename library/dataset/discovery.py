"""Which images and videos a subset names: in folders, metadata files and lists; masks by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from library.core.errors import ConfigError
from library.core.file_limits import stem_of
from library.dataset.cache_checks import crowded_names
from library.dataset.captions import metadata_caption
from library.dataset.clips.video_files import VIDEO_EXTENSIONS
from library.dataset.folders import has_extension, images_in, listing_of
from library.dataset.items import SubsetParams
from library.dataset.jsonl_lists import read_list
from library.dataset.metadata_files import ImageFinder, read_metadata_file
from library.dataset.scanner import FoundImage, Scanner


def discover(subset: SubsetParams, kind: str, scanner: Scanner) -> list[FoundImage]:
    """The images or videos that a subset names, sorted where a folder is read; nothing is opened but metadata files,
    lists and the lists of folders."""
    if subset.num_repeats == 0 or subset.source is None:  # a missing source was reported with the configuration
        return []
    if kind == "FT":
        return _from_metadata(subset, scanner)
    source, path = subset.source
    if source in ("image_jsonl_file", "video_jsonl_file"):
        images = _from_list(path, subset, scanner)
    else:
        images = images_in(path, subset, scanner)
        _warn_of_shared_stems(images, subset, scanner)
    if kind == "CN":
        images = _paired(images, subset, scanner)
    _check_cache_names(images, subset, scanner)
    return images


def _from_list(path: str, subset: SubsetParams, scanner: Scanner) -> list[FoundImage]:
    """Paths of a list start from the working folder."""
    medium = "image" if subset.clips is None else "video"
    try:
        entries = read_list(path, medium, subset.control_count)
    except ConfigError as error:
        scanner.problems += [f"{subset.label}: {problem}" for problem in error.problems]
        return []
    counts = {len(entry.targets) for entry in entries}
    if subset.multiple_target and (len(counts) > 1 or 0 in counts):
        scanner.problems.append(f"{subset.label}: {path}: multiple_target needs equally many layers of each picture,"
                                " image_path_1, image_path_2, ...")  # fmt: skip
    wanted = (path for entry in entries for path in entry.controls)
    scanner.missing_files(wanted, f"{subset.label}: {path} names control files that do not exist")
    return [
        FoundImage(
            entry.path, entry.path, entry.caption, control_paths=entry.controls,
            target_paths=entry.targets if subset.multiple_target else (),
        )
        for entry in entries
    ]  # fmt: skip


def _check_cache_names(images: Sequence[FoundImage], subset: SubsetParams, scanner: Scanner) -> None:
    """Files of different folders that have one name cannot share a folder of caches."""
    if subset.cache_directory is None:
        return
    paths = [image.path for image in images]
    crowded = crowded_names(list(map(os.path.basename, paths)), paths)
    groups = {tuple(group) for group in crowded.values()}
    scanner.problems += [
        f"{subset.label}: {' and '.join(group)} would share a file in cache_directory; rename one of them"
        for group in groups
    ]


def _warn_of_shared_stems(images: Sequence[FoundImage], subset: SubsetParams, scanner: Scanner) -> None:
    paths = [image.path for image in images]
    crowded = crowded_names(list(map(stem_of, paths)), paths)
    groups = {tuple(group) for group in crowded.values()}
    shared = sorted(" and ".join(map(os.path.basename, group)) for group in groups)
    what = f"groups of {subset.medium} in {subset.label} have one name and share a caption file"
    scanner.summary_warning(shared, what)


def _from_metadata(subset: SubsetParams, scanner: Scanner) -> list[FoundImage]:
    if subset.metadata_file is None:
        return []
    try:
        entries = read_metadata_file(subset.metadata_file)
    except ConfigError as error:
        scanner.problems += [f"{subset.label}: {problem}" for problem in error.problems]
        return []
    finder = ImageFinder(subset.image_dir, scanner.extensions)
    images = []
    for entry in entries:
        try:
            path = finder.find(entry.key)
        except ConfigError as error:
            scanner.bad_image(f"{subset.metadata_file}: {error}", entry.key, subset.label)
            continue
        caption = metadata_caption(entry.values, subset)
        tags = entry.values.get("tags") or ""
        images.append(FoundImage(
            entry.key, path, caption if "caption" in entry.values or tags else None,
            tags=tags if isinstance(tags, str) else ",".join(map(str, tags)),
        ))
    return images


def _paired(images: Sequence[FoundImage], subset: SubsetParams, scanner: Scanner) -> list[FoundImage]:
    """Give every image or video the file with its stem in conditioning_data_dir, the first by name where there are
    several; of a video a video or folder of frames before a picture, which then counts for all frames. Those that are
    not taken are only mentioned."""
    folder = subset.conditioning_data_dir
    if folder is None:
        return list(images)
    by_stem: dict[str, str] = {}
    second: list[str] = []
    listing = listing_of(folder, subset, scanner)
    if listing is None:
        return []
    names = [name for name in listing.files if has_extension(name, scanner.extensions)]
    if subset.clips is not None:
        videos = [name for name in listing.files if has_extension(name, frozenset(VIDEO_EXTENSIONS))]
        names = [*videos, *listing.folders, *names]
    for path in map(listing.of, names):
        first = by_stem.setdefault(os.path.splitext(os.path.basename(path))[0], path)
        if first != path:
            second.append(f"{path} ({os.path.basename(first)} is taken)")
    paired, used = [], set()
    for image in images:
        stem = os.path.splitext(os.path.basename(image.path))[0]
        used.add(stem)
        if stem in by_stem:
            paired.append(dataclasses.replace(image, cond_path=by_stem[stem]))
        else:
            beside = "image" if subset.clips is None else "video, folder of frames or image"
            scanner.bad_image(f"{image.path} has no {beside} named {stem} in {folder}", image.path, subset.label)
    extra = [path for stem, path in by_stem.items() if stem not in used]
    scanner.summary_warning(
        second, f"{subset.medium} in {folder} ({subset.label}) have the name of another"
    )
    scanner.summary_warning(
        extra, f"{subset.medium} in {folder} ({subset.label}) belong to no training {subset.medium.removesuffix('s')}"
    )
    return paired
