"""Which images and videos a subset names: folders, metadata files and lists; masks and control files by name. Also what
the steps of a scan share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field

from library.core.errors import ConfigError, listed
from library.core.file_limits import stem_of
from library.dataset.cache_checks import crowded_names
from library.dataset.cache_index import CacheIndex
from library.dataset.captions import caption_ending, metadata_caption
from library.dataset.clips.video_check import VideoCheck
from library.dataset.clips.video_files import VIDEO_EXTENSIONS
from library.dataset.control_files import control_pictures, control_videos, layers
from library.dataset.items import SubsetParams
from library.dataset.jsonl_lists import read_list
from library.dataset.media_utils import ImageCheck, image_extensions
from library.dataset.metadata_files import ImageFinder, read_metadata_file



@dataclass
class FoundImage:
    """An image or video on its way to an ImageItem. `caption` None: no caption file."""

    key: str
    path: str
    caption: str | None = None
    cond_path: str | None = None
    control_paths: tuple[str, ...] = ()
    target_paths: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    tags: str | None = None
    is_known: bool = False
    video: VideoCheck | None = None
    mask: ImageCheck | None = None
    controls: tuple[ImageCheck, ...] = ()
    """what was seen of these files"""


@dataclass
class Scanner:
    """What all steps of a scan share: settings, and the problems and warnings so far."""

    skip_bad_images: bool
    fail_on_missing_captions: bool
    check_images: bool
    """whether every image is read in full, and not only its header"""
    extensions: frozenset[str] = field(default_factory=image_extensions)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    too_small: set[str] = field(default_factory=set)
    """labels of subsets of which skip_image_resolution leaves no image"""
    without_captions: set[str] = field(default_factory=set)
    """labels of subsets whose images without caption file are left out"""
    too_short: dict[str, str] = field(default_factory=dict)
    """by label, why no clip can be cut out of the videos of a subset"""
    checks: dict[str, ImageCheck | ConfigError] = field(default_factory=dict)

    index: CacheIndex = field(default_factory=CacheIndex, repr=False)

    def bad_image(self, message: str, path: str, label: str) -> None:
        """An image that cannot be used: a problem, or with --skip_bad_images a warning."""
        self.skipped.add(path)
        way_out = "" if self.skip_bad_images else "; repair or remove it, or go on without it with --skip_bad_images"
        self.problem_or_warning(f"{label}: {message}{way_out}")

    def problem_or_warning(self, message: str) -> None:
        target = self.warnings if self.skip_bad_images else self.problems
        text = f"{message}; skipped" if self.skip_bad_images else message
        if text not in target:
            target.append(text)

    def summary_warning(self, names: Sequence[str], what: str) -> None:
        if names:
            self.warnings.append(f"{len(names)} {what}: {listed(names)}")

    def missing_files(self, paths: Iterable[str], what: str) -> None:
        """A problem that names those of the paths that lead nowhere."""
        if missing := [path for path in dict.fromkeys(paths) if not os.path.exists(path)]:
            self.problems.append(f"{what}: {listed(missing)}")


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
        images = _from_folder(path, subset, scanner)
        _warn_of_shared_stems(images, subset, scanner)
    if kind == "CN":
        images = _paired(images, subset, scanner)
    _check_cache_names(images, subset, scanner)
    return images


@dataclass(frozen=True)
class Listing:
    """What lies directly in a folder: names of files and of folders, sorted."""

    path: str
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def of(self, name: str) -> str:
        return os.path.join(self.path, name)


def _listing(folder: str, subset: SubsetParams, scanner: Scanner) -> Listing | None:
    """None where the folder cannot be read, which is noted."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
        return Listing(folder, tuple(sorted(files)), tuple(sorted(folders)))
    except FileNotFoundError:
        scanner.problem_or_warning(f"{subset.label}: the folder {folder} does not exist")
    except NotADirectoryError:
        scanner.problem_or_warning(f"{subset.label}: {folder} is a file; a folder is needed")
    except OSError as error:
        scanner.problem_or_warning(f"{subset.label}: the folder {folder} cannot be read ({error.strerror})")
    return None


def _from_folder(folder: str, subset: SubsetParams, scanner: Scanner) -> list[FoundImage]:
    listing = _listing(folder, subset, scanner)
    if listing is None:
        return []
    names = _of_medium(listing, subset, scanner)
    targets: dict[str, tuple[str, ...]] = {}
    if subset.multiple_target:
        targets = _fitted(lambda: layers(names, _captioned(names, listing, subset)), subset, scanner)
        layered = {name for found in targets.values() for name in found}
        names = [name for name in names if name not in layered]
    names = _with_captions(names, listing, subset, scanner)
    controls = _controls(names, subset, scanner)
    return [
        FoundImage(
            listing.of(name), listing.of(name), control_paths=controls.get(name, ()),
            target_paths=tuple(map(listing.of, targets.get(name, ()))),
        )
        for name in names
    ]  # fmt: skip


def _of_medium(listing: Listing, subset: SubsetParams, scanner: Scanner) -> list[str]:
    """The pictures or videos among the names; of a dataset without subsets those whose extension is all in small or all
    in capital letters."""
    extensions = scanner.extensions if subset.clips is None else frozenset(VIDEO_EXTENSIONS)
    names = [name for name in listing.files if _has_extension(name, extensions)]
    if subset.whole_captions:
        mixed = [name for name in names if not _is_plain(os.path.splitext(name)[1])]
        scanner.summary_warning(
            mixed, f"files in {subset.label} have an extension of small and capital letters and are left out"
        )
        names = [name for name in names if name not in set(mixed)]
    if subset.clips is None:
        return names
    return sorted([*names, *_frame_folders(listing, subset)])


def _is_plain(extension: str) -> bool:
    return extension in (extension.lower(), extension.upper())


def _frame_folders(listing: Listing, subset: SubsetParams) -> list[str]:
    """Sub-folders that have a caption file: videos in single frames."""
    ending, files = caption_ending(subset), set(listing.files)
    return [] if ending is None else [name for name in listing.folders if stem_of(name) + ending in files]


def _captioned(names: Sequence[str], listing: Listing, subset: SubsetParams) -> set[str]:
    """Names without extension of those that have a caption file."""
    ending, files = caption_ending(subset), set(listing.files)
    return set() if ending is None else {stem for stem in map(stem_of, names) if stem + ending in files}


def _with_captions(names: list[str], listing: Listing, subset: SubsetParams, scanner: Scanner) -> list[str]:
    """Without the pictures that have no caption file, where a dataset without subsets says what these are called."""
    is_choosy = subset.whole_captions and subset.clips is None and subset.class_tokens is None
    if not is_choosy or caption_ending(subset) is None or scanner.fail_on_missing_captions:
        return names
    captioned = _captioned(names, listing, subset)
    bare = [name for name in names if stem_of(name) not in captioned]
    scanner.skipped.update(map(listing.of, bare))
    scanner.without_captions |= {subset.label} if bare else set()
    scanner.summary_warning(
        bare, f"pictures in {subset.label} have no caption file ({caption_ending(subset)}) and are left out"
    )
    return [name for name in names if stem_of(name) in captioned] if bare else names


def _controls(names: Sequence[str], subset: SubsetParams, scanner: Scanner) -> dict[str, tuple[str, ...]]:
    """Of each name the paths of its control files."""
    if subset.control_directory is None or subset.control_count == 0:
        return {}
    listing = _listing(subset.control_directory, subset, scanner)
    if listing is None:
        return {}
    if subset.clips is None:
        pictures = [name for name in listing.files if _has_extension(name, scanner.extensions)]
        found = _fitted(lambda: control_pictures(names, pictures, subset.control_count), subset, scanner)
    else:
        files, folders = set(listing.files), set(listing.folders)
        videos = _fitted(lambda: control_videos(names, files, folders, VIDEO_EXTENSIONS), subset, scanner)
        found = {name: (control,) for name, control in videos.items()}
    return {name: tuple(map(listing.of, controls)) for name, controls in found.items()}


def _fitted(find: Callable[[], dict], subset: SubsetParams, scanner: Scanner) -> dict:
    """What `find` gives; nothing where names do not fit, which is noted."""
    try:
        return find()
    except ConfigError as error:
        scanner.problems += [f"{subset.label}: {problem}" for problem in error.problems]
        return {}


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
        f"{subset.label}: {' and '.join(group)} would share a file in cache_directory; rename one of them" for group in groups
    ]


def _has_extension(name: str, extensions: Container[str]) -> bool:
    """Quick for names that have another, which are most of what lies in a folder with caches."""
    return name[name.rfind(".") :].lower() in extensions and os.path.splitext(name)[1].lower() in extensions


def _warn_of_shared_stems(images: Sequence[FoundImage], subset: SubsetParams, scanner: Scanner) -> None:
    paths = [image.path for image in images]
    crowded = crowded_names(list(map(stem_of, paths)), paths)
    groups = {tuple(group) for group in crowded.values()}
    shared = sorted(" and ".join(map(os.path.basename, group)) for group in groups)
    scanner.summary_warning(shared, f"groups of images in {subset.label} have one name and share a caption file")


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
    listing = _listing(folder, subset, scanner)
    if listing is None:
        return []
    names = [name for name in listing.files if _has_extension(name, scanner.extensions)]
    if subset.clips is not None:
        videos = [name for name in listing.files if _has_extension(name, frozenset(VIDEO_EXTENSIONS))]
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

