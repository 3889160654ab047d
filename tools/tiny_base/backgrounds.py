"""What lies behind the things of a drawn scene: plain colours, gradients, patterns and a few landscapes."""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from tools.tiny_base.shapes import Colour, box, ellipse, mix

# A landscape looks the same every time: what the caption does not tell would only blur what the model learns.
STAR_PLACES = tuple((random.Random(i).random(), random.Random(i + 100).random()) for i in range(28))


def fill_plain(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    box(draw, 0, 0, size, size, first)


def fill_gradient(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    for y in range(size):
        draw.line((0, y, size, y), fill=mix(first, second, y / (size - 1)))


def fill_striped(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    box(draw, 0, 0, size, size, first)
    for i in range(0, 8, 2):
        box(draw, i * size / 8, 0, (i + 1) * size / 8 - 1, size, second)


def fill_checkered(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    box(draw, 0, 0, size, size, first)
    cell = size / 4
    for row in range(4):
        for column in range(row % 2, 4, 2):
            box(draw, column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1, second)


def fill_dotted(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    box(draw, 0, 0, size, size, first)
    for row in range(4):
        for column in range(4):
            ellipse(draw, (column + 0.5) * size / 4, (row + 0.5) * size / 4, size / 16, size / 16, second)


def fill_night(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    fill_gradient(draw, size, (12, 14, 50), (45, 40, 100))
    for x, y in STAR_PLACES:
        ellipse(draw, x * size, y * size, size / 90, size / 90, (250, 250, 220))


def fill_meadow(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    box(draw, 0, 0, size, size, (150, 205, 245))
    box(draw, 0, 0.62 * size, size, size, (95, 175, 70))


def fill_beach(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    box(draw, 0, 0, size, size, (165, 220, 250))
    box(draw, 0, 0.42 * size, size, size, (40, 120, 190))
    box(draw, 0, 0.68 * size, size, size, (238, 214, 150))


def fill_snow(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    box(draw, 0, 0, size, size, (185, 205, 225))
    box(draw, 0, 0.6 * size, size, size, (245, 248, 252))


def fill_sunset(draw: ImageDraw.ImageDraw, size: int, first: Colour, second: Colour) -> None:
    fill_gradient(draw, size, (110, 50, 120), (255, 170, 70))
    box(draw, 0, 0.72 * size, size, size, (70, 40, 60))


PATTERNS: dict[str, Callable[[ImageDraw.ImageDraw, int, Colour, Colour], None]] = {
    "plain": fill_plain, "gradient": fill_gradient, "striped": fill_striped,
    "checkered": fill_checkered, "dotted": fill_dotted,
    "night": fill_night, "meadow": fill_meadow, "beach": fill_beach, "snow": fill_snow, "sunset": fill_sunset,
}
LANDSCAPES = ("night", "meadow", "beach", "snow", "sunset")
TWO_COLOURED = ("gradient", "striped", "checkered", "dotted")


def new_canvas(size: int, pattern: str, first: Colour, second: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A square picture of `size` pixels with its background painted, and the pen for what comes on top."""
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    PATTERNS[pattern](draw, size, first, second)
    return image, draw
