"""What a cache tool would encode, shown: in a window, as characters in the console, or as files beside the caches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from library.core.errors import ConfigError
from library.dataset import cache_io
from library.dataset.cache_names import latents_base
from library.dataset.samples import Geometry, read_pixels
from library.training.clip_cache_options import BACKGROUNDS, ClipLatentsOptions

if TYPE_CHECKING:
    from library.dataset.items import ImageItem
    from library.families.record import DataArchitecture
    from library.training.data_phase import DataGroups

NEXT_DATASET, QUIT = "d", "q"
_KEYS = f"{NEXT_DATASET}: next dataset, {QUIT}: quit, anything else: next sample"
_SHADES = " .:-=+*#%@"
_STILLS = 3
"""frames of a clip that stand for it in one picture"""
_LINES_PER_COLUMN = 0.5  # characters are about twice as high as wide
_FOLDER = "previews"
_FPS = 24.0  # of a family without a rate of its own

Show = Callable[["ImageItem", list[Image.Image]], str]
"""one sample -> the key that was pressed, "" for none"""


def preview(options: ClipLatentsOptions, data: DataGroups, architecture: DataArchitecture) -> int:
    """Show every sample of all datasets, at its training size; returns how many. Nothing is encoded."""
    show = _show_of(options, architecture)
    if options.debug_mode != "video":
        print(_KEYS)
    count = 0
    for number, items in enumerate(_datasets(data)):
        print(f"dataset {number}: {len(items)} samples")
        for place, item in enumerate(items):
            frames = frames_of_sample(item)
            print(_line(place, item))
            key = show(item, frames)
            count += 1
            is_enough = options.console_num_images is not None and place + 1 >= options.console_num_images
            if key == QUIT:
                return count
            if key == NEXT_DATASET or (options.debug_mode == "console" and is_enough):
                break
    return count


def _datasets(data: DataGroups) -> Iterator[Sequence[ImageItem]]:
    """Samples of each dataset, those held out for validation behind the others; each file and window once."""
    for group in data.groups:
        for dataset in group.datasets:
            yield list({(item.absolute_path, item.window_key): item for item in dataset.used_items}.values())


def frames_of_sample(item: ImageItem) -> list[Image.Image]:
    """Its frames as the VAE sees them: scaled and cut."""
    pixels = read_pixels(item, Geometry.centred(item)).image  # [H, W, 3] or [F, H, W, 3]
    return [Image.fromarray(frame) for frame in (pixels if pixels.ndim == 4 else pixels[None])]


def _line(place: int, item: ImageItem) -> str:
    size = "x".join(map(str, item.bucket.key))
    window = f", {item.clip.words}" if item.clip is not None else ""
    controls = "".join(f", control {os.path.basename(path)}" for path in item.control_paths)
    return f"  {place}: {item.absolute_path}: {size}{window}{controls}; caption: {item.caption!r}"


def _show_of(options: ClipLatentsOptions, architecture: DataArchitecture) -> Show:
    if options.debug_mode == "image":
        return _in_window
    if options.debug_mode == "console":
        asks = options.console_num_images is None
        return lambda _, frames: _in_console(frames, options.console_width, options.console_back, asks)
    return lambda item, frames: _in_file(item, frames, architecture)


def stills(frames: Sequence[Image.Image]) -> Image.Image:
    """The first, the middle and the last frame of a clip side by side, or a picture as it is."""
    places = sorted({round(n * (len(frames) - 1) / (_STILLS - 1)) for n in range(_STILLS)})
    return Image.fromarray(np.hstack([np.asarray(frames[place]) for place in places]))


# ---- ways to show ----------------------------------------------------------------------------------------------------

def _in_window(_: ImageItem, frames: list[Image.Image]) -> str:
    import cv2

    try:
        cv2.imshow("sample", np.asarray(stills(frames))[..., ::-1])
        key = cv2.waitKey(0) & 0xFF
        cv2.destroyAllWindows()
    except cv2.error as error:
        raise ConfigError(
            "--debug_mode is image, and OpenCV can open no window here (opencv-python-headless has none, and a display"
            " is needed); use --debug_mode console or video"
        ) from error
    return chr(key)


def _in_console(frames: list[Image.Image], width: int, back: str | None, asks: bool) -> str:
    print(as_characters(stills(frames), width, back, has_colours=sys.stdout.isatty()))
    if not asks:
        return ""
    try:
        return input("> ").strip().lower()[:1]
    except EOFError:
        return ""


def as_characters(picture: Image.Image, width: int, back: str | None = None, *, has_colours: bool = True) -> str:
    """Lines of so many characters, the brighter the denser; with their colours, and `back` behind them."""
    height = max(1, round(picture.height * width / picture.width * _LINES_PER_COLUMN))
    small = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BOX))
    light = small @ np.array([0.299, 0.587, 0.114])
    shades = (light * (len(_SHADES) - 1) / 255).round().astype(int)
    start = f"\x1b[{40 + BACKGROUNDS.index(back)}m" if back is not None and has_colours else ""
    lines = []
    for row, colours in zip(shades, small):
        cells = [_SHADES[shade] for shade in row]
        if has_colours:
            cells = [f"\x1b[38;2;{r};{g};{b}m{cell}" for cell, (r, g, b) in zip(cells, colours)]
        lines.append(f"{start}{''.join(cells)}{chr(27) + '[0m' if has_colours else ''}")
    return "\n".join(lines)


def _in_file(item: ImageItem, frames: list[Image.Image], architecture: DataArchitecture) -> str:
    """A video of a clip, a JPEG of a picture, under the name of its cache. Beside files that are learned from they
    would be learned too, so they lie in a folder of their own there."""
    from library.core.atomic_file import atomic_path
    from library.generation.video_files import write_video

    path = Path(cache_io.latents_npz_path(architecture, latents_base(item), item.image_size))
    folder = path.parent / _FOLDER if item.subset.cache_directory is None else path.parent
    stem = folder / path.name.removesuffix(path.suffix)
    if len(frames) > 1:
        clips = architecture.clips
        written = write_video(frames, stem.with_name(f"{stem.name}.mp4"), clips.fps if clips and clips.fps else _FPS)
    else:
        written = stem.with_name(f"{stem.name}.jpg")
        with atomic_path(written) as temporary:
            frames[0].save(temporary, "JPEG", quality=95)
    print(f"     wrote {written}")
    return ""
