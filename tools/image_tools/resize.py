"""Copies of images, each with at most as many pixels as a resolution has."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.options import Config, option
from library.scripts.folder_tool import FolderTool, Tally, WriteOptions, files_of, folder_problem, images_of, read_ahead
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("atelier")

INTERPOLATIONS = ("area", "cubic", "lanczos4", "nearest", "linear", "box")
OURS = {"lanczos4": "lanczos"}
"""names of known tools -> ours, whose Lanczos filter does not alias when it makes images smaller"""


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """What is resized"""

    src_img_folder: str | None = option(None, help="folder of the images")
    dst_img_folder: str | None = option(None, help="folder for the copies; made when it is missing")
    max_resolution: str = option(
        "512x512,384x384,256x256,128x128", help="resolutions WxH with commas between; a copy is made for each"
    )
    divisible_by: int = option(1, help="cut both sides, in the middle, to a multiple of this")
    interpolation: str | None = option(
        None, choices=INTERPOLATIONS, help="filter; area when not given, as images are only made smaller"
    )
    save_as_png: bool = option(
        False, help="write PNG, which keeps transparency, instead of JPEG of quality 100 with white behind"
    )
    copy_associated_files: bool = option(
        False, help="copy files of the same name (captions) under the name of each copy"
    )
    max_data_loader_n_workers: int | None = option(None, help="images that are read at a time")


CLASSES = (ResizeOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool(
    "Make copies of images with at most as many pixels as a resolution has, the shape kept", CLASSES,
    ("src_img_folder", "dst_img_folder")
)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def resolutions_of(text: str) -> dict[str, int]:
    """`512x512,384x384` -> name of each resolution and its pixels. ValueError for anything else."""
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", part.strip())
        if not match or not int(match[1]) or not int(match[2]):
            raise ValueError(part)
        found[part.strip()] = int(match[1]) * int(match[2])
    return found


def problems_of(config: Config) -> Iterator[str]:
    options = config[ResizeOptions]
    found = folder_problem("src_img_folder", options.src_img_folder)
    if found:
        yield found
    elif os.path.realpath(options.src_img_folder) == os.path.realpath(options.dst_img_folder):
        yield f"dst_img_folder is {options.dst_img_folder}, the folder of the images; name another one"
    if os.path.isfile(options.dst_img_folder):
        yield f"dst_img_folder is {options.dst_img_folder}, which is a file; name a folder"
    if options.divisible_by < 1:
        yield f"--divisible_by is {options.divisible_by}; needed: 1 or more"
    try:
        resolutions_of(options.max_resolution)
    except ValueError as error:
        yield f"--max_resolution has '{error}'; needed: WIDTHxHEIGHT with commas between, e.g. 512x512,256x256"


def run(argv: Sequence[str] | None = None) -> None:
    config = TOOL.read(argv, problems_of)
    options = config[ResizeOptions]
    images, tally = images_of(options.src_img_folder), Tally()
    logger.info("copies keep the shape of their image, and each is made from the image itself")
    resize_images(images, config, tally)
    copy_others(images, config, tally)
    tally.finish("copies of images")


def resize_images(images: Sequence[str], config: Config, tally: Tally) -> None:
    """A copy of every image for every resolution, each from the image itself, so that their order does not matter."""
    from library.dataset.image_files import read_for, write_image

    options, overwrite = config[ResizeOptions], config[WriteOptions].overwrite
    extension = ".png" if options.save_as_png else ".jpg"
    resolutions = resolutions_of(options.max_resolution)
    copies = {
        path: {copy_path(path, name, extension, config): pixels for name, pixels in resolutions.items()}
        for path in images
    }
    counts = Counter(copy for path in images for copy in copies[path])

    def needed(path: str) -> bool:
        return overwrite or not all(os.path.exists(copy) for copy in copies[path])

    for path in images:
        if not needed(path):
            tally.skip("whose copies exist; --overwrite makes them anew")
    beside = files_by_stem(options.src_img_folder) if options.copy_associated_files else {}
    workers = options.max_data_loader_n_workers
    for path, image in read_ahead(
        lambda path: read_for(path, extension), list(filter(needed, images)), tally, what="resizing", workers=workers
    ):
        if any(counts[copy] > 1 for copy in copies[path]):
            tally.fail(f"{path} shares its name with another image, and so would their copies")
            continue
        for copy, pixels in copies[path].items():
            if overwrite or not os.path.exists(copy):
                write_image(copy, shrunk(image, pixels, options))
        if options.copy_associated_files:
            copy_associated(
                [name for name in beside[os.path.splitext(path)[0]] if name != path],
                options.dst_img_folder,
                resolutions,
                overwrite,
            )
        tally.done += 1


def copy_path(path: str, resolution: str, extension: str, config: Config) -> str:
    """`<stem>+<WxH><extension>` in the folder of the copies."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return os.path.join(config[ResizeOptions].dst_img_folder, f"{stem}+{resolution}{extension}")


def shrunk(image: np.ndarray, max_pixels: int, options: ResizeOptions) -> np.ndarray:
    """[H, W, C] with at most `max_pixels`: both sides times sqrt(max_pixels / (H W)), rounded down, then cut in the
    middle to multiples of `divisible_by`. An image that is small enough is cut alone."""
    from library.dataset.media_utils import resize_image

    height, width = image.shape[:2]
    if width * height > max_pixels:
        factor = math.sqrt(max_pixels / (width * height))
        size_wh = (max(int(width * factor), 1), max(int(height * factor), 1))
        image = resize_image(image, size_wh, OURS.get(options.interpolation, options.interpolation))
        width, height = size_wh
    step = options.divisible_by
    cut_w, cut_h = (max(side // step * step, min(side, step)) for side in (width, height))
    left, top = (width - cut_w) // 2, (height - cut_h) // 2
    return image[top : top + cut_h, left : left + cut_w].copy()


def files_by_stem(folder: str) -> dict[str, list[str]]:
    """Path without extension -> files of a folder that have it."""
    found: dict[str, list[str]] = {}
    for path in files_of(folder):
        found.setdefault(os.path.splitext(path)[0], []).append(path)
    return found


def copy_associated(names: Sequence[str], folder: str, resolutions: Iterable[str], overwrite: bool) -> None:
    """Copies of the files beside an image, under the names of its copies."""
    for name in names:
        stem, extension = os.path.splitext(os.path.basename(name))
        for resolution in resolutions:
            copy_file(name, os.path.join(folder, f"{stem}+{resolution}{extension}"), overwrite)


def copy_others(images: Sequence[str], config: Config, tally: Tally) -> None:
    """Files that are no images keep their names; those of an image only where they were not copied under its copies'
    names."""
    options = config[ResizeOptions]
    known = set(images)
    stems = {os.path.splitext(path)[0] for path in images} if options.copy_associated_files else set()
    for path in files_of(options.src_img_folder):
        if path not in known and os.path.splitext(path)[0] not in stems:
            copy_file(
                path, os.path.join(options.dst_img_folder, os.path.basename(path)), config[WriteOptions].overwrite
            )


def copy_file(source: str, target: str, overwrite: bool) -> None:
    from library.core.atomic_file import atomic_path

    if os.path.exists(target) and not overwrite:
        logger.warning("%s exists and stays; --overwrite replaces it", target)
        return
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
