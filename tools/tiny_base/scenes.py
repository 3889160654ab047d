"""Scenes: a record of what is to be seen, drawn from a keyed random number, and its picture.

What a caption does not mention has one fixed look (medium size, in the middle), so that a text determines its picture
up to small variations of tone and place.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from library.core.keyed_random import keyed_random
from tools.tiny_base.backgrounds import LANDSCAPES, TWO_COLOURED, new_canvas
from tools.tiny_base.shapes import COLOURS, SHAPES, Colour

IMAGE_SIZE_PX = 64
SUPERSAMPLING = 4
SIZES: dict[str, float] = {"small": 0.14, "medium": 0.22, "large": 0.34}  # radius as a share of the picture
PLACES: dict[str, tuple[float, float]] = {
    "center": (0.5, 0.5), "left": (0.26, 0.5), "right": (0.74, 0.5), "top": (0.5, 0.26), "bottom": (0.5, 0.74),
    "top left": (0.26, 0.26), "top right": (0.74, 0.26), "bottom left": (0.26, 0.74), "bottom right": (0.74, 0.74),
}
PAIR_PLACES: dict[str, tuple[str, str]] = {
    "left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top"),
}


@dataclass(frozen=True)
class Thing:
    """One painted thing."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Background:
    """A pattern of PATTERNS with the names of its colours; landscapes have none."""

    pattern: str
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """One or two things (`relation` tells how the first stands to the second) before a background."""

    things: tuple[Thing, ...]
    background: Background
    relation: str | None


def draw_background(rng: random.Random, avoid: set[str]) -> Background:
    """A background that no thing of the scene disappears into."""
    free = [name for name in COLOURS if name not in avoid]
    kind = rng.random()
    if kind < 0.6:
        return Background("plain", (rng.choice(free),))
    if kind < 0.8:
        return Background(rng.choice(TWO_COLOURED), tuple(rng.sample(free, 2)))
    return Background(rng.choice(LANDSCAPES), ())


def draw_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of this seed."""
    rng = keyed_random(seed, "scene", index)
    shapes, colours = rng.choices(list(SHAPES), k=2), rng.sample(list(COLOURS), 2)
    if rng.random() < 0.3:
        relation = rng.choice(list(PAIR_PLACES))
        places = PAIR_PLACES[relation]
        sizes = ["medium", "medium"] if rng.random() < 0.7 else rng.sample(["small", "medium"], 2)
        things = tuple(Thing(*each) for each in zip(shapes, colours, sizes, places))
        return Scene(things, draw_background(rng, set(colours)), relation)
    size = rng.choice(["small", "medium", "medium", "large", "large"])
    place = "center" if size == "large" or rng.random() < 0.4 else rng.choice(list(PLACES))
    things = (Thing(shapes[0], colours[0], size, place),)
    return Scene(things, draw_background(rng, {colours[0]}), None)


def tinted(colour: Colour, rng: random.Random, amount: int = 7) -> Colour:
    """The colour with a slightly other tone."""
    return tuple(min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)  # type: ignore[return-value]


def finish(image: Image.Image, size: int = IMAGE_SIZE_PX) -> Image.Image:
    """The drawing reduced to its final size."""
    return image.resize((size, size), Image.Resampling.BOX)


def render(scene: Scene, rng: random.Random, size: int = IMAGE_SIZE_PX) -> Image.Image:
    """The picture of a scene; `rng` gives the small variations of tone and place."""
    canvas_px = size * SUPERSAMPLING
    colours = [tinted(COLOURS[name], rng) for name in scene.background.colours] + [(0, 0, 0)] * 2
    image, draw = new_canvas(canvas_px, scene.background.pattern, colours[0], colours[1])
    for thing in scene.things:
        x, y = (canvas_px * (share + rng.uniform(-0.02, 0.02)) for share in PLACES[thing.place])
        radius = canvas_px * SIZES[thing.size] * rng.uniform(0.96, 1.04)
        SHAPES[thing.shape](draw, x, y, radius, tinted(COLOURS[thing.colour], rng))
    return finish(image, size)


def clutter(seed: int, index: int, size: int = IMAGE_SIZE_PX) -> Image.Image:
    """A picture without sense or caption: many things of any colour, size and place. The autoencoder learns from these
    that a picture may hold anything, so that it also keeps what the captioned scenes never show."""
    rng = keyed_random(seed, "clutter", index)
    any_colour = lambda: tuple(rng.randrange(256) for _ in range(3))  # noqa: E731
    canvas_px = size * SUPERSAMPLING
    image, draw = new_canvas(canvas_px, rng.choice(("plain", *TWO_COLOURED)), any_colour(), any_colour())
    for _ in range(rng.randint(2, 14)):
        x, y, radius = rng.random() * canvas_px, rng.random() * canvas_px, rng.uniform(0.03, 0.35) * canvas_px
        SHAPES[rng.choice(list(SHAPES))](draw, x, y, radius, any_colour())
    if rng.random() < 0.4:
        image = image.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR, fillcolor=any_colour())
    return finish(image, size)
