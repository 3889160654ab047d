"""The things that a drawn scene can hold: each is a function that paints one thing of a colour, centred, of a given
radius.

All of it is drawn at SUPERSAMPLING times the final size and reduced once at the end, which gives smooth edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import ImageDraw

Colour = tuple[int, int, int]
Painter = Callable[[ImageDraw.ImageDraw, float, float, float, Colour], None]

COLOURS: dict[str, Colour] = {
    "red": (220, 45, 45),
    "orange": (245, 140, 35),
    "yellow": (250, 215, 55),
    "green": (50, 160, 75),
    "teal": (45, 175, 175),
    "blue": (50, 90, 220),
    "purple": (140, 65, 185),
    "pink": (245, 145, 190),
    "brown": (130, 80, 45),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
    "gray": (140, 140, 145),
}


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour `share` of the way from the first to the second."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second))  # type: ignore[return-value]


def shade(colour: Colour, amount: float = 0.4) -> Colour:
    """A darker tone of the colour; a lighter one where the colour is nearly black."""
    return mix(colour, (0, 0, 0), amount) if sum(colour) > 150 else mix(colour, (255, 255, 255), amount)


def ellipse(draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
    """A filled ellipse around (x, y)."""
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)


def box(draw: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
    """A filled rectangle."""
    draw.rectangle((left, top, right, bottom), fill=colour)


def ring_points(
    x: float, y: float, radii: tuple[float, ...], count: int, start: float = -90.0
) -> list[tuple[float, float]]:
    """`count` points around (x, y), the radii taken in turn, the first at `start` degrees."""
    angles = [math.radians(start + 360.0 * i / count) for i in range(count)]
    return [
        (x + radii[i % len(radii)] * math.cos(a), y + radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)
    ]


def paint_circle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    ellipse(draw, x, y, r, r, colour)


def paint_square(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    box(draw, x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r, colour)


def paint_triangle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=colour)


def paint_star(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.polygon(ring_points(x, y, (1.1 * r, 0.46 * r), 10), fill=colour)


def paint_diamond(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.polygon([(x, y - 1.1 * r), (x + 0.75 * r, y), (x, y + 1.1 * r), (x - 0.75 * r, y)], fill=colour)


def paint_hexagon(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.polygon(ring_points(x, y, (r,), 6, start=0), fill=colour)


def paint_cross(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    box(draw, x - r, y - 0.3 * r, x + r, y + 0.3 * r, colour)
    box(draw, x - 0.3 * r, y - r, x + 0.3 * r, y + r, colour)


def paint_heart(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    for side in (-1, 1):
        ellipse(draw, x + side * 0.47 * r, y - 0.35 * r, 0.53 * r, 0.53 * r, colour)
    draw.polygon([(x - 0.97 * r, y - 0.15 * r), (x + 0.97 * r, y - 0.15 * r), (x, y + r)], fill=colour)


def paint_ring(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=max(1, round(0.34 * r)))


def paint_moon(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    outer = [(x + r * math.cos(math.radians(a)), y + r * math.sin(math.radians(a))) for a in range(60, 301, 8)]
    inner = [
        (x + 0.42 * r + 0.87 * r * math.cos(math.radians(a)), y + 0.87 * r * math.sin(math.radians(a)))
        for a in range(264, 95, -8)
    ]
    draw.polygon(outer + inner, fill=colour)


def paint_flower(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    for px, py in ring_points(x, y, (0.62 * r,), 6):
        ellipse(draw, px, py, 0.4 * r, 0.4 * r, colour)
    ellipse(draw, x, y, 0.34 * r, 0.34 * r, COLOURS["yellow"] if colour != COLOURS["yellow"] else COLOURS["brown"])


def paint_house(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    box(draw, x - 0.8 * r, y - 0.1 * r, x + 0.8 * r, y + 0.95 * r, colour)
    draw.polygon([(x, y - r), (x + 1.05 * r, y - 0.1 * r), (x - 1.05 * r, y - 0.1 * r)], fill=shade(colour, 0.45))
    box(draw, x - 0.22 * r, y + 0.3 * r, x + 0.22 * r, y + 0.95 * r, shade(colour, 0.6))


def paint_tree(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    box(draw, x - 0.17 * r, y + 0.2 * r, x + 0.17 * r, y + r, COLOURS["brown"])
    for dx, dy, size in ((-0.42, -0.1, 0.5), (0.42, -0.1, 0.5), (0.0, -0.5, 0.55)):
        ellipse(draw, x + dx * r, y + dy * r, size * r, size * r, colour)


def paint_fish(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.polygon([(x + 0.4 * r, y), (x + 1.1 * r, y - 0.6 * r), (x + 1.1 * r, y + 0.6 * r)], fill=shade(colour, 0.25))
    ellipse(draw, x - 0.2 * r, y, 0.9 * r, 0.58 * r, colour)
    ellipse(draw, x - 0.62 * r, y - 0.14 * r, 0.15 * r, 0.15 * r, (255, 255, 255))
    ellipse(draw, x - 0.65 * r, y - 0.14 * r, 0.08 * r, 0.08 * r, (0, 0, 0))


def paint_mushroom(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    box(draw, x - 0.28 * r, y, x + 0.28 * r, y + 0.95 * r, (240, 228, 200))
    draw.pieslice((x - r, y - 0.95 * r, x + r, y + 1.05 * r), 180, 360, fill=colour)
    for dx, dy in ((-0.5, -0.3), (0.05, -0.62), (0.5, -0.25)):
        ellipse(draw, x + dx * r, y + dy * r, 0.15 * r, 0.15 * r, mix(colour, (255, 255, 255), 0.75))


def paint_boat(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.polygon(
        [(x - r, y + 0.3 * r), (x + r, y + 0.3 * r), (x + 0.6 * r, y + 0.9 * r), (x - 0.6 * r, y + 0.9 * r)],
        fill=colour,
    )
    box(draw, x - 0.06 * r, y - r, x + 0.06 * r, y + 0.3 * r, COLOURS["brown"])
    draw.polygon(
        [(x + 0.12 * r, y - 0.95 * r), (x + 0.85 * r, y + 0.15 * r), (x + 0.12 * r, y + 0.15 * r)], fill=(235, 235, 225)
    )


def paint_cloud(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    for dx, dy, size in ((-0.6, 0.15, 0.42), (0.0, -0.15, 0.58), (0.6, 0.15, 0.42), (0.0, 0.3, 0.35)):
        ellipse(draw, x + dx * r, y + dy * r, size * r, size * r, colour)


def paint_cup(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.ellipse((x + 0.25 * r, y - 0.4 * r, x + 1.05 * r, y + 0.45 * r), outline=colour, width=max(1, round(0.18 * r)))
    rim, foot = (
        ((x - 0.8 * r, y - 0.75 * r), (x + 0.65 * r, y - 0.75 * r)),
        ((x + 0.5 * r, y + 0.85 * r), (x - 0.65 * r, y + 0.85 * r)),
    )
    draw.polygon([*rim, *foot], fill=colour)
    ellipse(draw, x - 0.07 * r, y - 0.75 * r, 0.72 * r, 0.18 * r, shade(colour, 0.5))


def paint_face(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    ellipse(draw, x, y, r, r, colour)
    ink = (20, 20, 25) if sum(colour) > 150 else (240, 240, 240)
    for side in (-1, 1):
        ellipse(draw, x + side * 0.36 * r, y - 0.25 * r, 0.13 * r, 0.18 * r, ink)
    draw.arc((x - 0.55 * r, y - 0.4 * r, x + 0.55 * r, y + 0.6 * r), 25, 155, fill=ink, width=max(1, round(0.13 * r)))


def paint_car(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    roof = [
        (x - 0.6 * r, y - 0.05 * r),
        (x - 0.35 * r, y - 0.6 * r),
        (x + 0.4 * r, y - 0.6 * r),
        (x + 0.7 * r, y - 0.05 * r),
    ]
    draw.polygon(roof, fill=shade(colour, 0.3))
    box(draw, x - 1.05 * r, y - 0.1 * r, x + 1.05 * r, y + 0.45 * r, colour)
    for side in (-1, 1):
        ellipse(draw, x + side * 0.58 * r, y + 0.48 * r, 0.28 * r, 0.28 * r, (30, 30, 35))
        ellipse(draw, x + side * 0.58 * r, y + 0.48 * r, 0.11 * r, 0.11 * r, (190, 190, 195))


SHAPES: dict[str, Painter] = {
    "circle": paint_circle, "square": paint_square, "triangle": paint_triangle, "star": paint_star,
    "diamond": paint_diamond, "hexagon": paint_hexagon, "cross": paint_cross, "heart": paint_heart,
    "ring": paint_ring, "moon": paint_moon, "flower": paint_flower, "house": paint_house,
    "tree": paint_tree, "fish": paint_fish, "mushroom": paint_mushroom, "boat": paint_boat,
    "cloud": paint_cloud, "cup": paint_cup, "face": paint_face, "car": paint_car,
}
