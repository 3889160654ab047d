"""The files of a scan, opened once each by several threads: pictures and videos, and the masks and control files beside
them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from library.core.errors import ConfigError
from library.dataset.background import map_in_threads
from library.dataset.clips.video_check import VideoCheck
from library.dataset.clips.video_files import look_at_noted_video, verify_video
from library.dataset.image_headers import look_at_noted_image
from library.dataset.items import SubsetParams
from library.dataset.media_utils import (
    ImageCheck,
    check_conditioning_size,
    verify_image,
)
from library.dataset.scanner import FoundImage, Scanner

logger = logging.getLogger(__name__)

MAX_THREADS = 8


def files_of(image: FoundImage, subset: SubsetParams, reads_known: bool) -> dict[str, bool]:
    """Files to be opened for an image or video, and whether each is read as a video: all that stands beside one is.
    `reads_known`: also those of which everything was noted."""
    own = [] if image.is_known and not reads_known else [image.path, *image.target_paths]
    beside = [path for path in (image.cond_path, *image.control_paths) if path is not None]
    return dict.fromkeys((*own, *beside), subset.clips is not None)


def check_files(wanted: Mapping[str, bool], scanner: Scanner) -> None:
    """Look at files, which are videos or not, and keep what was seen, or the error, in `scanner.checks`."""
    if not wanted:
        return

    def check(path: str) -> ImageCheck | ConfigError:
        try:
            if scanner.check_images:
                return verify_video(path) if wanted[path] else verify_image(path)
            return (look_at_noted_video if wanted[path] else look_at_noted_image)(path, scanner.index)
        except ConfigError as error:
            return error

    logger.info("checking %d files of images and videos", len(wanted))
    threads = (
        min(MAX_THREADS, os.cpu_count() or 1) if scanner.check_images else MAX_THREADS
    )  # headers wait for the disk
    scanner.checks.update(zip(wanted, map_in_threads(check, list(wanted), num_threads=threads)))


def take_check(image: FoundImage, subset: SubsetParams, scanner: Scanner) -> bool:
    """Take over what was seen; False when the image, or a file beside it, cannot be used (which is then noted)."""
    result = scanner.checks.get(image.path)
    try:
        _raise_first(result, *(scanner.checks.get(path) for path in image.target_paths))
        if isinstance(result, ImageCheck) and image.size is None:
            image.size = result.size
        if isinstance(result, VideoCheck):
            image.video = result
        _check_alpha(image, subset)
        beside = [scanner.checks[path] for path in (image.cond_path, *image.control_paths) if path is not None]
        _raise_first(*beside)
        if image.cond_path is not None:
            image.mask = beside.pop(0)
            check_conditioning_size(image.cond_path, image.mask.size, image.size or (0, 0))
        image.controls = tuple(beside)
    except ConfigError as error:
        scanner.bad_image(str(error), image.path, subset.label)
        return False
    return True


def _raise_first(*checks: ImageCheck | ConfigError | None) -> None:
    for check in checks:
        if isinstance(check, ConfigError):
            raise check


def _check_alpha(image: FoundImage, subset: SubsetParams) -> None:
    video = image.video
    if subset.alpha_mask and video is not None and video.transparent and not video.reads_alpha:
        raise ConfigError(
            f"{image.path} has transparency, which alpha_mask needs and OpenCV does not read: install PyAV (pip install"
            " av)"
        )
