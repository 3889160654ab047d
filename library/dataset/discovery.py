"""Which images a subset names: folders, metadata files, masks by name. Also what the steps of a scan share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from library.core.errors import ConfigError
from library.core.file_limits import stem_of
from library.dataset.cache_checks import crowded_names
from library.dataset.cache_index import CacheIndex
from library.dataset.captions import metadata_caption
from library.dataset.items import SubsetParams
from library.dataset.media_utils import ImageCheck, image_extensions
from library.dataset.metadata_files import ImageFinder, read_metadata_file

SHOWN = 5


@dataclass
class FoundImage:
    """An image on its way to an ImageItem. `caption` None: no caption file."""

    key: str
    path: str
    caption: str | None = None
    cond_path: str | None = None
    size: tuple[int, int] | None = None
    tags: str | None = None
    is_known: bool = False


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


def discover(subset: SubsetParams, kind: str, scanner: Scanner) -> list[FoundImage]:
    """The images that a subset names, sorted; nothing is opened but metadata files and the lists of folders."""
    if subset.num_repeats == 0:
        return []
    if kind == "FT":
        return _from_metadata(subset, scanner)
    if subset.image_dir is None:
        return []  # the missing key was reported with the configuration
    images = [FoundImage(path, path) for path in _image_paths(subset.image_dir, subset, scanner)]
    _warn_of_shared_stems(images, subset, scanner)
    if kind == "CN":
        images = _paired(images, subset, scanner)
    return images


def _image_paths(folder: str, subset: SubsetParams, scanner: Scanner) -> list[str]:
    """Image files directly in a folder, sorted by path; the case of the extension does not matter."""
    try:
        with os.scandir(folder) as entries:
            paths = [
                entry.path for entry in entries if _has_extension(entry.name, scanner.extensions) and entry.is_file()
            ]
        return sorted(paths)
    except FileNotFoundError:
        scanner.problem_or_warning(f"{subset.label}: the folder {folder} does not exist")
        return []
    except NotADirectoryError:
        scanner.problem_or_warning(f"{subset.label}: {folder} is a file; a folder is needed")
        return []
    except OSError as error:
        scanner.problem_or_warning(f"{subset.label}: the folder {folder} cannot be read ({error.strerror})")
        return []


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
    """Give every image the file with its stem in conditioning_data_dir, the first by name where there are several.
    Those that are not taken are only mentioned."""
    folder = subset.conditioning_data_dir
    if folder is None:
        return list(images)
    by_stem: dict[str, str] = {}
    second: list[str] = []
    for path in _image_paths(folder, subset, scanner):
        first = by_stem.setdefault(os.path.splitext(os.path.basename(path))[0], path)
        if first != path:
            second.append(f"{path} ({os.path.basename(first)} is taken)")
    if not os.path.isdir(folder):
        return []
    paired, used = [], set()
    for image in images:
        stem = os.path.splitext(os.path.basename(image.path))[0]
        used.add(stem)
        if stem in by_stem:
            paired.append(dataclasses.replace(image, cond_path=by_stem[stem]))
        else:
            scanner.bad_image(f"{image.path} has no image named {stem} in {folder}", image.path, subset.label)
    extra = [path for stem, path in by_stem.items() if stem not in used]
    scanner.summary_warning(
        second, f"images in {folder} ({subset.label}) have the name of another"
    )
    scanner.summary_warning(extra, f"images in {folder} ({subset.label}) belong to no training image")
    return paired


def listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
