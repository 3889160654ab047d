"""The scan: from a Blueprint to the images of a run, with sizes, captions, masks and the validation split.

Every file problem is collected; one error names them all, before any model is loaded.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from library.config_util import Blueprint, DatasetConfigError, ScriptRules, load_blueprint
from library.core.console import storable
from library.core.errors import ConfigError, listed
from library.core.garbage import records_stay
from library.dataset import CachingOptions, DatasetOptions
from library.dataset.architectures import DataArchitecture
from library.dataset.bucket import BucketSelector
from library.dataset.cache_index import CacheIndex
from library.dataset.captions import caption_ending, caption_endings, read_caption, tags_of_folders
from library.dataset.clips.cutting import Cutter
from library.dataset.clips.video_files import VIDEO_EXTENSIONS
from library.dataset.discovery import discover
from library.dataset.file_checks import check_files, files_of, take_check
from library.dataset.folders import NAME_VIDEOS, has_extension
from library.dataset.info_cache import info_entry, known_image, read_info, write_info
from library.dataset.items import NO_CAPTIONS, DatasetParams, ImageItem, SubsetParams
from library.dataset.media_utils import ImageCheck
from library.dataset.native_sizes import NativeSizes, native_problems, without_copies
from library.dataset.scanner import FoundImage, Scanner

logger = logging.getLogger(__name__)

DEFAULT_SPLIT_SEED = 42
"""seed of the validation split when neither validation_seed nor --seed is given: two runs agree"""
MOST_PROBLEMS = 50
CAPTION_EXTENSIONS = (".txt", ".caption", ".tags", ".cap")
"""what caption files are called by the programs that write them"""
CAPTION_WAYS = {True: "write a caption for each there", False: "give them caption files"}
"""whether a file lists them -> what to do"""
CLASS_TOKENS_HINT = ', or write one text for all of them: class_tokens = "..." in the subset'
MOST_SAMPLES = 50_000_000
"""of an epoch, with repeats; each is a number in memory"""


@dataclass(frozen=True)
class ScanResult:
    """The images of all datasets, in the order of the blueprint. Validation items have num_repeats 1."""

    train: list[list[ImageItem]]
    validation: list[list[ImageItem]]
    has_validation: bool
    """whether a validation split was asked for; the split itself may still be empty"""
    warnings: tuple[str, ...]
    """those of the blueprint and of the scan; to be logged once, by the main process"""
    num_used: int
    num_skipped: int
    index: CacheIndex = field(default_factory=CacheIndex, repr=False)
    """what was noted of pictures and caches beside them; saved by whoever writes caches there"""

    @property
    def tag_frequency(self) -> list[dict[str, dict[str, int]]]:
        """Per dataset: folder or metadata file name -> tag -> captions that hold it."""
        return [tags_of_folders(items) for items in self.train]

    @property
    def summary(self) -> str:
        skipped = f", {self.num_skipped} left out" if self.num_skipped else ""
        clips = [item for part in (*self.train, *self.validation) for item in part if item.clip is not None]
        videos = len({item.absolute_path for item in clips})
        parts = [_counted(self.num_used - videos, "image")] if self.num_used > videos or not videos else []
        parts += [f"{_counted(len(clips), 'clip')} of {_counted(videos, 'video')}"] if videos else []
        return f"{' and '.join(parts)} found{skipped}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


@records_stay()
def scan_datasets(
    blueprint: Blueprint,
    *,
    seed: int | None = None,
    skip_bad_images: bool = False,
    fail_on_missing_captions: bool = False,
    check_images: bool = False,
    architecture: DataArchitecture | None = None,
) -> ScanResult:
    """Find all images of a blueprint. Sizes come from headers; with `check_images` every image is read in full, so that
    damage inside a file is known now and not when it is first used.

    `seed` is the run's seed, on which the validation split falls back; `architecture` says how videos are cut into
    clips, and is needed only for those. Raises ConfigError with all problems: folders
    that are missing or empty, images that cannot be read (left out with `skip_bad_images`), captions, masks, metadata
    files.
    """
    scanner = Scanner(skip_bad_images, fail_on_missing_captions, check_images)
    found = [[discover(subset, dataset.kind, scanner) for subset in dataset.subsets] for dataset in blueprint.datasets]
    _read_files(blueprint, found, scanner)
    for dataset, images_of in zip(blueprint.datasets, found):
        for subset, images in zip(dataset.subsets, images_of):
            _leave_out_small(images, subset, dataset, scanner)
    train: list[list[ImageItem]] = []
    validation: list[list[ImageItem]] = []
    for dataset, images_of in zip(blueprint.datasets, found):
        parts = [
            _items_of(subset, images, dataset, seed, scanner, architecture)
            for subset, images in zip(dataset.subsets, images_of)
        ]
        train.append([item for part, _ in parts for item in part])
        validation.append([item for _, part in parts for item in part])
    has_validation = any(_split_of(subset, dataset) > 0 for dataset in blueprint.datasets for subset in dataset.subsets)
    _check_counts(blueprint, train, validation, has_validation, scanner)
    if scanner.problems:
        raise ConfigError(_cut(scanner.problems))
    used = {item.absolute_path for part in (*train, *validation) for item in part}
    warnings = (*blueprint.warnings, *scanner.warnings)
    return ScanResult(
        train, validation, has_validation, warnings, len(used), len(scanner.skipped - used), scanner.index
    )


def load_datasets(
    options: DatasetOptions,
    caching: CachingOptions | None = None,
    *,
    explicit: frozenset[str] = frozenset(),
    architecture: DataArchitecture,
    script: str | ScriptRules = "train_network",
    seed: int | None = None,
    check_images: bool | None = None,
    native: NativeSizes | None = None,
) -> tuple[Blueprint, ScanResult]:
    """Read the configuration and scan its images; problems of both are raised together, as one ConfigError.

    `check_images`: see scan_datasets; by default what the options say. With `native` pictures keep their sizes, and
    what several datasets have of one is a sample of the first.
    """
    if check_images is None:
        check_images = reads_all_images(options, caching)
    settings = dict(
        architecture=architecture, seed=seed, skip_bad_images=options.skip_bad_images,
        fail_on_missing_captions=options.fail_on_missing_captions,
        check_images=check_images,
    )
    try:
        blueprint = load_blueprint(
            options, caching, explicit=explicit, architecture=architecture, script=script, native=native
        )
    except DatasetConfigError as error:
        if error.partial is None or not error.partial.datasets:
            raise
        try:
            scan_datasets(error.partial, **settings)
        except ConfigError as files:
            raise ConfigError([*error.problems, *files.problems]) from error
        raise
    scan = scan_datasets(blueprint, **settings)
    if native is None:
        return blueprint, scan
    if problems := list(native_problems(blueprint, scan)):
        raise ConfigError(problems)
    return blueprint, without_copies(blueprint, scan)


def reads_all_images(options: DatasetOptions, caching: CachingOptions | None) -> bool:
    """Whether images are read in full at the start: when asked for, and where damaged ones are to be left out of a run
    that has no latent cache, whose making shows which they are."""
    return options.check_images or (options.skip_bad_images and not (caching is not None and caching.caches_latents))


# ---------------------------------------------------------------- reading


def _read_files(blueprint: Blueprint, found: list[list[list[FoundImage]]], scanner: Scanner) -> None:
    """Sizes and captions of all images; every file is opened once, however many datasets use it, by several threads."""
    pairs = [
        (subset, images) for dataset, parts in zip(blueprint.datasets, found) for subset,
        images in zip(dataset.subsets, parts)
    ]
    infos = {subset.folder: read_info(subset.folder) for subset, _ in pairs if subset.cache_info and subset.folder}
    wanted: dict[str, bool] = {}
    for subset, images in pairs:
        for image in images:
            _take_known(image, infos.get(subset.folder) if subset.cache_info else None, subset)
            for path, is_video in files_of(image, subset, reads_known=scanner.check_images).items():
                wanted[path] = is_video or wanted.get(path, False)  # what is seen of a video, a picture has as well
    check_files(wanted, scanner)
    owners = [dataset for dataset in blueprint.datasets for _ in dataset.subsets]
    for dataset, (subset, images) in zip(owners, pairs, strict=True):
        images[:] = [image for image in images if take_check(image, subset, scanner)]
        if not subset.is_listed:
            _read_captions(images, subset, scanner)
        _warn_of_pixels(images, subset, dataset, scanner)
        _settle_captions(images, subset, scanner)
        if subset.cache_info and subset.folder and images and not all(image.is_known for image in images):
            _write_info(subset, images, scanner)


def _take_known(image: FoundImage, info: Mapping[str, Any] | None, subset: SubsetParams) -> None:
    """What the cache of a folder knows of an image."""
    known = None if info is None else known_image(info, image.path, subset)
    if known is not None:
        image.size, image.caption, image.video, image.is_known = known.size, known.caption, known.video, True


def _read_captions(images: Sequence[FoundImage], subset: SubsetParams, scanner: Scanner) -> None:
    for image in images:
        if image.is_known:
            continue
        try:
            image.caption = read_caption(image.path, subset)
        except ConfigError as error:
            scanner.problems += [
                f"{subset.label}: {problem}" for problem in error.problems if problem not in scanner.problems
            ]


def _leave_out_small(images: list[FoundImage], subset: SubsetParams, dataset: DatasetParams, scanner: Scanner) -> None:
    """Images that skip_image_resolution keeps out of this dataset. Another dataset of the same folder may use them."""
    limit = dataset.skip_image_resolution
    if limit is None or not images:
        return
    kept = [image for image in images if image.size is None or image.size[0] * image.size[1] > limit[0] * limit[1]]
    if not kept:
        scanner.too_small.add(subset.label)
    if len(kept) < len(images):
        scanner.warnings.append(
            f"{subset.label}: {len(images) - len(kept)} of {len(images)} images have no more pixels than "
            "skip_image_resolution"
            f" {limit[0]}x{limit[1]} and are left out of this dataset"
        )
    images[:] = kept


def _write_info(subset: SubsetParams, images: Sequence[FoundImage], scanner: Scanner) -> None:
    """The cache holds the caption of the file, before class_tokens stand in, and the whole subset, before any split."""
    entries = {
        os.path.basename(image.path): info_entry(image.path, image.size, image.caption, subset, image.video)
        for image in images if image.size is not None
    }
    warning = write_info(subset.folder, entries)
    if warning:
        scanner.warnings.append(warning)


def _settle_captions(images: Sequence[FoundImage], subset: SubsetParams, scanner: Scanner) -> None:
    """Mention images without a caption or with an empty one, and what is to be written for them."""
    bare = [image.path for image in images if image.caption is None]
    empty = [image.path for image in images if image.caption == ""]
    scanner.summary_warning(empty, f"{subset.medium} in {subset.label} have an empty caption")
    if not bare or (subset.class_tokens and subset.is_listed):
        return
    hint = _caption_hint(bare, subset)
    if not hint and not subset.class_tokens:
        hint = f"; {CAPTION_WAYS[subset.is_listed]}{'' if subset.metadata_file else CLASS_TOKENS_HINT}"
    if subset.class_tokens:
        if hint:
            scanner.warnings.append(
                f"{len(bare)} {subset.medium} in {subset.label} train with class_tokens {subset.class_tokens!r}{hint}"
            )
    elif scanner.fail_on_missing_captions:
        scanner.problems.append(
            f"{subset.label}: {len(bare)} {subset.medium} have no caption: {listed(bare)}{hint}"
        )
    else:
        scanner.warnings.append(
            f"{len(bare)} {subset.medium} in {subset.label} have no caption and train with an empty one: "
            f"{listed(bare)}{hint}"
        )


def _caption_hint(paths: Sequence[str], subset: SubsetParams) -> str:
    """The line to add when images without a caption have a text file of another extension beside them; "" when they
    have none."""
    if subset.is_listed:
        return ""
    wanted = caption_ending(subset)
    others = [extension for extension in CAPTION_EXTENSIONS if extension != wanted]
    counts = {
        extension: sum(os.path.isfile(os.path.splitext(path)[0] + extension) for path in paths) for extension in others
    }
    extension = max(counts, key=counts.get)
    if not counts[extension]:
        return ""
    has = "has" if counts[extension] == 1 else "have"
    return (
        f"; {counts[extension]} of them {has} a {extension} file, and caption_extension is "
        f"{wanted or 'not given'}:"
        f' write caption_extension = "{extension}" in the dataset configuration, or --caption_extension {extension}'
    )


def _warn_of_pixels(
    images: Sequence[FoundImage], subset: SubsetParams, dataset: DatasetParams, scanner: Scanner
) -> None:
    pictures = [(image.path, scanner.checks.get(image.path)) for image in images]
    masks = [(image.cond_path, scanner.checks.get(image.cond_path)) for image in images if image.cond_path is not None]

    def those(attribute: str, checks: Sequence[tuple[str, ImageCheck | ConfigError | None]] = pictures) -> list[str]:
        kinds = {
            check
            for check in set(map(itemgetter(1), checks))
            if isinstance(check, ImageCheck) and getattr(check, attribute)
        }
        return [path for path, check in checks if check in kinds] if kinds else []

    what = f"{subset.medium} in {subset.label}"
    scanner.summary_warning(those("deep"), f"{what} have more than 8 bits per channel; 8 are used")
    if subset.alpha_mask:
        scanner.summary_warning(
            those("invisible"), f"{what} are transparent everywhere, so nothing is learned from them"
        )
    else:
        scanner.summary_warning(those("transparent"), f"{what} have transparency, which is dropped")
    if not dataset.holds_control:
        scanner.summary_warning(
            those("black", masks), f"masks of {subset.label} are black everywhere, so nothing is learned there"
        )


# ---------------------------------------------------------------- items and split


def split_validation(names: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation images, each in the order of `names`.

    The sorted names are shuffled with Python's generator of this seed; the last round(n * fraction) validate.
    """
    if round(len(names) * fraction) == 0:
        return list(range(len(names))), []
    order = sorted(range(len(names)), key=lambda index: names[index])
    random.Random(seed).shuffle(order)
    num_validation = round(len(order) * fraction)
    chosen = set(order[len(order) - num_validation :])
    return [i for i in range(len(names)) if i not in chosen], sorted(chosen)


def _split_of(subset: SubsetParams, dataset: DatasetParams) -> float:
    if subset.is_reg or subset.num_repeats == 0:
        return 0.0
    return dataset.validation_split if subset.validation_split is None else subset.validation_split


def _items_of(
    subset: SubsetParams, images: Sequence[FoundImage], dataset: DatasetParams, seed: int | None, scanner: Scanner,
    architecture: DataArchitecture | None,
) -> tuple[list[ImageItem], list[ImageItem]]:
    """The training and validation items of a subset. Regularisation images all stay in training. The clips of a video
    are all on one side."""
    cutter = Cutter.of(subset, architecture)
    if cutter is not None:
        images = _cut_videos(images, cutter, subset, scanner)
    elif subset.no_resize_control and architecture is not None:
        images = [image for image in images if _has_large_controls(image, subset, architecture, scanner)]
    absolute = AbsolutePaths()
    seeds = (dataset.validation_seed, seed, DEFAULT_SPLIT_SEED)
    split_seed = next(value for value in seeds if value is not None)
    fraction = _split_of(subset, dataset)
    train, validation = split_validation([image.key for image in images], fraction, split_seed)
    if fraction > 0 and images and not validation:
        scanner.warnings.append(
            f"{subset.label}: validation_split {fraction} of {len(images)} {subset.medium} leaves none for validation"
        )
    return (
        [item for i in train for item in _samples(images[i], subset, subset.num_repeats, absolute, cutter)],
        [item for i in validation for item in _samples(images[i], subset, 1, absolute, cutter)],
    )


def _cut_videos(
    images: Sequence[FoundImage], cutter: Cutter, subset: SubsetParams, scanner: Scanner
) -> list[FoundImage]:
    """The videos of which there are clips, and what is to be told of them."""
    videos = [(image.path, image.video) for image in images]
    problem = cutter.settings_problem()
    if problem is not None:
        scanner.problems.append(f"{subset.label}: {problem}")
    short = cutter.too_short(videos)
    kept = [image for image in images if cutter.clips_of(image.video)]
    if short is not None and kept:
        scanner.warnings.append(f"{subset.label}: {short}")
    elif short is not None:
        scanner.too_short[subset.label] = short
    scanner.warnings += [f"{subset.label}: {notice}" for notice in cutter.notices(videos)]
    return kept


def _has_large_controls(
    image: FoundImage, subset: SubsetParams, architecture: DataArchitecture, scanner: Scanner
) -> bool:
    """Whether control pictures that keep their size have one step of the buckets, or more; else this is noted."""
    step = architecture.bucket_step
    small = [path for path, seen in zip(image.control_paths, image.controls) if min(seen.size) < step]
    if small:
        scanner.bad_image(
            f"{listed(small)} is smaller than {step}x{step}, which {architecture.name} needs of control pictures that"
            " keep their size (no_resize_control)", image.path, subset.label
        )
    return not small


def _samples(
    image: FoundImage, subset: SubsetParams, num_repeats: int, absolute: AbsolutePaths, cutter: Cutter | None
) -> list[ImageItem]:
    """One item of a picture, one for each clip of a video."""
    item = _item(image, subset, num_repeats, absolute)
    if cutter is None:
        return [item]
    beside = image.mask or next(iter(image.controls), None)
    control = None if beside is None else cutter.control_clip(beside, image.video)
    return [
        dataclasses.replace(item, clip=clip, frames=clip.length, control_clip=control)
        for clip in cutter.clips_of(image.video)
    ]


class AbsolutePaths:
    """os.path.abspath for many files of few folders, each of which is looked up once."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def of(self, path: str) -> str:
        folder, _, name = path.rpartition(os.sep)
        if not folder or name in ("", ".", "..") or (os.altsep and os.altsep in name):
            return os.path.abspath(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.join(os.path.abspath(folder + os.sep), "")
        absolute = self._folders[folder]
        return path if absolute[:-1] == folder else absolute + name  # most are, and need no second text


def _item(image: FoundImage, subset: SubsetParams, num_repeats: int, absolute: AbsolutePaths) -> ImageItem:
    caption = storable(image.caption if image.caption is not None else subset.class_tokens or "")
    path = absolute.of(image.path)
    return ImageItem(
        image_key=path if image.key == path else image.key, absolute_path=path, caption=caption, subset=subset,
        image_size=image.size or (0, 0), num_repeats=num_repeats, cond_path=image.cond_path,
        control_paths=tuple(map(absolute.of, image.control_paths)),
        target_paths=tuple(map(absolute.of, image.target_paths)),
        control_image_sizes=tuple(control.size for control in image.controls),
        captions_extra=NO_CAPTIONS if image.tags is None else {"tags": storable(image.tags)},
    )


# ---------------------------------------------------------------- counts


def _check_counts(
    blueprint: Blueprint, train: list[list[ImageItem]], validation: list[list[ImageItem]], has_validation: bool,
    scanner: Scanner
) -> None:
    """Empty folders, datasets and runs; epochs longer than memory holds; bucket settings that no image fits."""
    for dataset, items, held_out in zip(blueprint.datasets, train, validation):
        samples = sum(item.num_repeats for item in items)
        if samples > MOST_SAMPLES:
            scanner.problems.append(
                f"{dataset.label}: {len(items)} images with their num_repeats are {samples} samples in an epoch; at "
                f"most {MOST_SAMPLES} are"
                " possible: lower num_repeats, the run is as long as --max_train_steps or --max_train_epochs says"
            )
        filled = {item.subset.label for item in (*items, *held_out)}
        for subset in dataset.subsets:
            if subset.label not in filled and subset.num_repeats and _is_readable(subset):
                why = _why_empty(subset, dataset, scanner)
                (scanner.warnings if filled else scanner.problems).append(f"{subset.label}: {why}")
        if items and not blueprint.is_partial:
            selector = BucketSelector.of(dataset)
            if any(selector.select(item.image_size, item.frames) is not None for item in items):
                continue
            if dataset.native is not None:
                scanner.problems.append(
                    f"{dataset.label}: of every image one side is shorter than {dataset.native.step} px, the step of"
                    " sizes; larger ones are needed"
                )
            else:
                finer = " or lower bucket_reso_steps" if dataset.bucket_rule == "steps" else ""
                scanner.problems.append(
                    f"{dataset.label}: of every image one side would be shorter than one bucket step "
                    f"({dataset.bucket_reso_steps} px), and bucket_no_upscale is on; switch it off{finer}"
                )
    if scanner.problems:
        return
    if not any(not item.is_reg for items in train for item in items):
        only_reg = any(items for items in train)
        reason = "there are only regularisation images" if only_reg else "there is no image to train on"
        scanner.problems.append(f"{reason}; check the folders, num_repeats and validation_split of the datasets")
    if has_validation and not any(validation):
        scanner.warnings.append("a validation split is set and leaves no image for validation; nothing is validated")


def _is_readable(subset: SubsetParams) -> bool:
    """Whether the folder or file is there: if not, that was reported already."""
    if subset.source is None:
        return False
    return os.path.isfile(subset.source[1]) if subset.is_listed else os.path.isdir(subset.source[1])


def _why_empty(subset: SubsetParams, dataset: DatasetParams, scanner: Scanner) -> str:
    if subset.label in scanner.too_short:
        return scanner.too_short[subset.label]
    if subset.label in scanner.too_small and dataset.skip_image_resolution is not None:
        width, height = dataset.skip_image_resolution
        return (
            f"every image has no more pixels than skip_image_resolution {width}x{height}; lower it, or leave the dataset"
            " out"
        )
    _, folder = subset.source or ("", "")
    medium = subset.medium.removesuffix("s")
    if subset.is_listed:
        return f"{folder} names no {medium} that can be used"
    extensions = scanner.extensions if subset.clips is None else VIDEO_EXTENSIONS
    if subset.label in scanner.without_captions:
        endings = " or ".join(caption_endings(subset))
        return (
            f"no image in {folder} that can be used has a caption file ({endings}); write them, or class_tokens for all"
        )
    if any(os.path.splitext(name)[1].lower() in extensions for name in os.listdir(folder)):
        return f"no {medium} in {folder} can be used"
    if any(has_extension(name, frozenset(VIDEO_EXTENSIONS)) for name in os.listdir(folder)):
        return f"the folder {folder} holds videos and no {subset.medium}; {NAME_VIDEOS}"
    inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    hint = f"; it has sub-folders ({listed(inner)}): give each its own subset" if inner else ""
    return f"the folder {folder} holds no {subset.medium} ({', '.join(sorted(extensions))}){hint}"


def _cut(problems: Sequence[str]) -> list[str]:
    more = len(problems) - MOST_PROBLEMS
    return [*problems[:MOST_PROBLEMS], *([f"and {more} more problems of the same kinds"] if more > 0 else [])]
