"""Which images or videos a folder holds, by the names of what lies there; nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.core.file_limits import stem_of
from library.dataset.captions import caption_endings
from library.dataset.clips.video_files import VIDEO_EXTENSIONS
from library.dataset.control_files import control_pictures, control_videos, layers
from library.dataset.items import SubsetParams
from library.dataset.scanner import FoundImage, Scanner

NAME_VIDEOS = "video_directory of a dataset or subset reads videos"


@dataclass(frozen=True)
class Listing:
    """What lies directly in a folder: names of files and of folders, sorted."""

    path: str
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def of(self, name: str) -> str:
        return os.path.join(self.path, name)


def listing_of(folder: str, subset: SubsetParams, scanner: Scanner) -> Listing | None:
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


def images_in(folder: str, subset: SubsetParams, scanner: Scanner) -> list[FoundImage]:
    """The images or videos directly in a folder, sorted by name, with their control files and layers."""
    listing = listing_of(folder, subset, scanner)
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
            path, path, control_paths=controls.get(name, ()),
            target_paths=tuple(map(listing.of, targets.get(name, ()))),
        )
        for name, path in zip(names, map(listing.of, names))
    ]  # fmt: skip


def _of_medium(listing: Listing, subset: SubsetParams, scanner: Scanner) -> list[str]:
    """The pictures or videos among the names; of a dataset without subsets those whose extension is all in small or all
    in capital letters."""
    extensions = scanner.extensions if subset.clips is None else frozenset(VIDEO_EXTENSIONS)
    names = [name for name in listing.files if has_extension(name, extensions)]
    if subset.whole_captions:
        mixed = [name for name in names if not _is_plain(os.path.splitext(name)[1])]
        scanner.summary_warning(
            mixed, f"files in {subset.label} have an extension of small and capital letters and are left out"
        )
        names = [name for name in names if _is_plain(os.path.splitext(name)[1])]
    if subset.clips is None:
        videos = [name for name in listing.files if has_extension(name, frozenset(VIDEO_EXTENSIONS))]
        scanner.summary_warning(videos, f"videos in the folder of {subset.label} are no part of it; {NAME_VIDEOS}")
        return names
    return sorted([*names, *_frame_folders(listing, subset)])


def _is_plain(extension: str) -> bool:
    return extension in (extension.lower(), extension.upper())


def _frame_folders(listing: Listing, subset: SubsetParams) -> list[str]:
    """Sub-folders that have a caption file: videos in single frames."""
    captioned = _captioned(listing.folders, listing, subset)
    return [name for name in listing.folders if stem_of(name) in captioned]


def _captioned(names: Sequence[str], listing: Listing, subset: SubsetParams) -> set[str]:
    """Names without extension of those that have a caption file."""
    endings, files = caption_endings(subset), set(listing.files)
    return {stem for stem in map(stem_of, names) if any(stem + ending in files for ending in endings)}


def _with_captions(names: list[str], listing: Listing, subset: SubsetParams, scanner: Scanner) -> list[str]:
    """Without the pictures that have no caption file, where a dataset without subsets says what these are called."""
    is_choosy = subset.whole_captions and subset.clips is None and subset.class_tokens is None
    if not is_choosy or not caption_endings(subset) or scanner.fail_on_missing_captions:
        return names
    captioned = _captioned(names, listing, subset)
    bare = [name for name in names if stem_of(name) not in captioned]
    scanner.skipped.update(map(listing.of, bare))
    scanner.without_captions |= {subset.label} if bare else set()
    scanner.summary_warning(
        bare,
        f"pictures in {subset.label} have no caption file ({' or '.join(caption_endings(subset))}) and are left out",
    )
    return [name for name in names if stem_of(name) in captioned] if bare else names


def _controls(names: Sequence[str], subset: SubsetParams, scanner: Scanner) -> dict[str, tuple[str, ...]]:
    """Of each name the paths of its control files."""
    if subset.control_directory is None or subset.control_count == 0:
        return {}
    listing = listing_of(subset.control_directory, subset, scanner)
    if listing is None:
        return {}
    if subset.clips is None:
        pictures = [name for name in listing.files if has_extension(name, scanner.extensions)]
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


def has_extension(name: str, extensions: Container[str]) -> bool:
    """Quick for names that have another, which are most of what lies in a folder with caches."""
    return name[name.rfind(".") :].lower() in extensions and os.path.splitext(name)[1].lower() in extensions
