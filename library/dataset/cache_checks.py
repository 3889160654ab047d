"""Which settings do not go with a cache, and whether cache files can be written: looked at before any model is
loaded."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from library.core.errors import ConfigError
from library.core.file_owners import clean_leftovers
from library.dataset.captions import random_caption_settings
from library.dataset.items import ImageItem, SubsetParams

LATENT_BREAKERS = {
    "color_aug": "its colours change at every use",
    "random_crop": "its crop changes at every use",
    "face_crop_aug_range": "its crop changes at every use",
}
"""Subset settings under which an image has no single latents."""


def caching_problems(subsets: Iterable[SubsetParams], *, latents: bool, text: bool) -> list[str]:
    """One message per setting of a subset that does not go with the caches that are on."""
    problems = []
    for subset in subsets:
        where = subset.label or (subset.source or ("", ""))[1]
        if latents:
            problems += [
                f"{where}.{name} is {getattr(subset, name)}, but latents are cached and an image has one cache entry "
                f"while {why};"
                f" set {name} to its default or leave --cache_latents and --cache_latents_to_disk out"
                for name, why in LATENT_BREAKERS.items()
                if getattr(subset, name)
            ]
        if text:
            problems += [
                f"{where}.{name} is {getattr(subset, name)}, but text encoder outputs are cached and it gives a "
                "caption another"
                f" text at every use; set {name} to its default or leave --cache_text_encoder_outputs out"
                for name in random_caption_settings(subset)
            ]
    return problems


def check_caching(subsets: Iterable[SubsetParams], *, latents: bool, text: bool) -> None:
    """Raise one ConfigError with every problem of caching_problems."""
    if problems := caching_problems(subsets, latents=latents, text=text):
        raise ConfigError(problems)


def cache_paths(items: Sequence[ImageItem], path_of: Callable[[ImageItem, str], str]) -> list[str]:
    """The cache file of every item; `path_of(item, image path)` is the family's name for it.

    Different images that would share a file (`a.png` and `a.jpg`; where the file system ignores case, `A.png` and
    `a.jpg`) get one each, with the extension in its name: `a.png_0640x0480_sd.npz`. Raises ConfigError where that name
    is another image's too.
    """
    paths = [path_of(item, item.absolute_path) for item in items]
    images = [item.absolute_path for item in items]
    shared = crowded_names(paths, images)
    if not shared:
        return paths
    for index, item in enumerate(items):
        if paths[index] in shared:
            paths[index] = path_of(item, item.absolute_path + os.path.splitext(item.absolute_path)[1])
    still = crowded_names(paths, images)
    if still:
        raise ConfigError(
            [f"{' and '.join(group)} would share a cache file; rename one of the images" for group in still.values()]
        )
    return paths


def crowded_names(names: Sequence[str], images: Sequence[str]) -> dict[str, list[str]]:
    """From names and the images that they belong to: each name that is one and the same file for different images ->
    these images."""
    folded = _folded(names)
    if len(set(folded)) == len(set(zip(folded, images))):
        return {}  # no name has two images, whatever the file system takes for one name
    owners: dict[str, dict[str, str]] = {}
    for key, name, image in zip(folded, names, images):
        owners.setdefault(key, {})[image] = name
    crowded: dict[str, list[str]] = {}
    for images in owners.values():
        if len(images) < 2:
            continue
        is_folded = len(set(images.values())) > 1 and any(ignores_case(image) for image in images)
        together: dict[str, list[str]] = {}
        for image, name in images.items():
            together.setdefault("" if is_folded else name, []).append(image)
        for group in together.values():
            if len({os.path.realpath(image) for image in group}) > 1:
                crowded |= {images[image]: group for image in group}
    return crowded


def _folded(names: Sequence[str]) -> list[str]:
    """The names in the form in which some file systems compare them, all in one go: no file name holds a zero
    character."""
    return unicodedata.normalize("NFC", "\0".join(names)).casefold().split("\0")


def ignores_case(path: str) -> bool:
    """Whether the file system takes names that differ in case for one; asked with a file that is there."""
    folder, name = os.path.split(path)
    try:
        return os.path.samefile(path, os.path.join(folder, name.swapcase()))
    except OSError:
        return False


def check_cache_folders(paths: Iterable[str], subsets: Iterable[SubsetParams] = ()) -> None:
    """Raise ConfigError when one of these files could not be written, naming every folder that refuses and everything
    that is no file where one belongs. What killed runs left half written there goes, and a cache_directory of the
    `subsets` is made."""
    paths = list(paths)
    new = {os.path.abspath(subset.cache_directory) for subset in subsets if subset.cache_directory is not None}
    problems = [
        f"{path} is where a cache file belongs, and is a {'folder' if os.path.isdir(path) else 'pipe or device'}; "
        "remove or rename it"
        for path in sorted(set(paths)) if os.path.exists(path) and not os.path.isfile(path)
    ]  # fmt: skip
    for folder in sorted({os.path.dirname(path) or "." for path in paths}):
        clean_leftovers(folder)
        try:
            if folder in new:
                os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problems.append(
                f"cache files cannot be written to {folder} ({error.strerror}); make it writable,"
                " or keep the caches in memory (--cache_latents, --cache_text_encoder_outputs without _to_disk)"
            )
    if problems:
        raise ConfigError(problems)
