"""Which settings do not go with a cache, and whether cache files can be written: looked at before any model is loaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

from library.dataset.captions import random_caption_settings
from library.dataset.items import ImageItem, SubsetParams
from library.errors import ConfigError
from library.file_owners import clean_leftovers

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
        where = subset.label or subset.image_dir or subset.metadata_file
        if latents:
            problems += [
                f"{where}.{name} is {getattr(subset, name)}, but latents are cached and an image has one cache entry while {why};"
                f" set {name} to its default or leave --cache_latents and --cache_latents_to_disk out"
                for name, why in LATENT_BREAKERS.items()
                if getattr(subset, name)
            ]
        if text:
            problems += [
                f"{where}.{name} is {getattr(subset, name)}, but text encoder outputs are cached and it gives a caption another"
                f" text at every use; set {name} to its default or leave --cache_text_encoder_outputs out"
                for name in random_caption_settings(subset)
            ]
    return problems


def check_caching(subsets: Iterable[SubsetParams], *, latents: bool, text: bool) -> None:
    """Raise one ConfigError with every problem of caching_problems."""
    if problems := caching_problems(subsets, latents=latents, text=text):
        raise ConfigError(problems)


def shared_file_problems(items: Iterable[ImageItem], path_of) -> list[str]:
    """Different images that would take the same cache file (`a.png` and `a.jpg`); `path_of(item)` names the file."""
    owners: dict[str, str] = {}
    problems = []
    for item in items:
        path, image = path_of(item), os.path.realpath(item.absolute_path)
        other = owners.setdefault(path, image)
        if other != image:
            problems.append(f"{other} and {image} would share the cache file {os.path.basename(path)}; rename one of the images")
    return sorted(set(problems))


def check_cache_folders(paths: Iterable[str]) -> None:
    """Raise ConfigError when one of these files could not be written, naming every folder that refuses and everything that is no
    file where one belongs. What killed runs left half written there goes."""
    paths = list(paths)
    problems = [
        f"{path} is where a cache file belongs, and is a {'folder' if os.path.isdir(path) else 'pipe or device'}; remove or rename it"
        for path in sorted(set(paths)) if os.path.exists(path) and not os.path.isfile(path)
    ]  # fmt: skip
    for folder in sorted({os.path.dirname(path) or "." for path in paths}):
        clean_leftovers(folder)
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problems.append(
                f"cache files cannot be written to {folder} ({error.strerror}); make it writable,"
                " or keep the caches in memory (--cache_latents, --cache_text_encoder_outputs without _to_disk)"
            )
    if problems:
        raise ConfigError(problems)
