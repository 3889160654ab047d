"""What all steps of a scan share: the files on their way to items, settings, and what was found out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from library.core.errors import ConfigError, listed
from library.dataset.cache_index import CacheIndex
from library.dataset.clips.video_check import VideoCheck
from library.dataset.media_utils import ImageCheck, image_extensions


@dataclass(slots=True)
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
