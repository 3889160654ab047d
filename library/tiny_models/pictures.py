"""Small captioned pictures and the dataset configuration that names them, to train a tiny model on."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

from library.core.atomic_file import atomic_path, write_text_atomically

SIZE_PX = 64
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 70), "blue": (50, 80, 200)}
SHAPES = ("circle", "square")
DATASET = """\
[general]
caption_extension = ".txt"

[[datasets]]
resolution = {size}
batch_size = {batch_size}

  [[datasets.subsets]]
  image_dir = {images}
"""


def write_dataset(folder: str | Path, *, count: int = 8, batch_size: int = 2, seed: int = 0) -> Path:
    """Write `count` pictures with captions into `folder`/images and the configuration; the path of the
    configuration."""
    folder = Path(folder)
    draw_pictures(folder / "images", count, seed=seed)
    return write_configuration(folder / "dataset.toml", folder / "images", SIZE_PX, batch_size)


def write_configuration(path: Path, images: Path, size: int | list[int], batch_size: int) -> Path:
    """Write the configuration of a dataset of one folder of captioned pictures; returns `path`. `size`: the resolution
    in pixels, one side or [width, height]."""
    quoted = json.dumps(images.as_posix(), ensure_ascii=False)  # a JSON string is a TOML string
    write_text_atomically(path, DATASET.format(size=size, batch_size=batch_size, images=quoted))
    return path


def draw_pictures(folder: str | Path, count: int, *, seed: int = 0) -> Path:
    """Draw circles and squares on plain backgrounds, as NN.png with the caption in NN.txt; returns the folder."""
    folder = Path(folder)
    for number in range(count):
        draws = random.Random(f"{seed} {number}")
        shape, colour, background = draws.choice(SHAPES), *draws.sample(list(COLOURS), 2)
        picture = Image.new("RGB", (SIZE_PX, SIZE_PX), COLOURS[background])
        radius = draws.randint(10, 22)
        x, y = (draws.randint(radius + 2, SIZE_PX - radius - 2) for _ in "xy")
        pen = ImageDraw.Draw(picture)
        draw = pen.ellipse if shape == "circle" else pen.rectangle
        draw((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
        with atomic_path(folder / f"{number:02d}.png") as temporary:
            picture.save(temporary, format="PNG")
        write_text_atomically(folder / f"{number:02d}.txt", f"a {colour} {shape}, {background}\n")
    return folder
