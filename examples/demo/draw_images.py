"""Draw the demo's pictures again: a creature that the tiny base has never seen, and ordinary scenes beside it.

    python examples/demo/draw_images.py

`images/` holds the zorbit before many backgrounds. `regularization/` holds what the base knows already: ordinary things
before the same backgrounds, which show that only the word zorbit makes the difference, and other scenes. Each picture
has its caption in a text file of the same name.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

    from tools.tiny_base.scenes import Scene

TRIGGER = "zorbit"
LIME, MAGENTA, CREAM, INK, AMBER = (165, 225, 60), (205, 40, 140), (255, 250, 225), (25, 20, 35), (255, 180, 40)
PLAIN = ("red", "orange", "yellow", "teal", "blue", "purple", "pink", "brown", "white", "black", "gray", "green")
LANDSCAPES = {
    "night": "in front of a starry night sky", "meadow": "on a meadow", "beach": "at the beach", "snow": "in the snow",
    "sunset": "at sunset",
}
PATTERNED = (
    ("striped", "blue", "white"), ("striped", "orange", "black"), ("checkered", "yellow", "purple"),
    ("checkered", "red", "white"),
    ("dotted", "teal", "pink"), ("dotted", "white", "blue"), ("gradient", "orange", "purple"),
)
NUM_OTHER_SCENES = 24
REGULARIZATION_SEED = 77


def paint_zorbit(draw: ImageDraw, x: float, y: float, r: float) -> None:
    """One round lime creature with a single eye, two antennae with amber knobs, a magenta belly band and three feet."""
    from tools.tiny_base.shapes import box, ellipse

    for side in (-1, 1):
        draw.line(
            (x + side * 0.3 * r, y - 0.6 * r, x + side * 0.62 * r, y - 1.12 * r),
            fill=INK,
            width=max(1, round(0.09 * r)),
        )
        ellipse(draw, x + side * 0.62 * r, y - 1.12 * r, 0.2 * r, 0.2 * r, AMBER)
    for dx in (-0.5, 0.0, 0.5):
        box(draw, x + (dx - 0.13) * r, y + 0.6 * r, x + (dx + 0.13) * r, y + 1.2 * r, INK)
    ellipse(draw, x, y + 0.05 * r, r, 0.88 * r, LIME)
    draw.chord((x - r, y - 0.83 * r, x + r, y + 0.93 * r), 20, 160, fill=MAGENTA)
    ellipse(draw, x, y - 0.2 * r, 0.46 * r, 0.46 * r, CREAM)
    ellipse(draw, x, y - 0.2 * r, 0.2 * r, 0.28 * r, INK)


def zorbit_picture(pattern: str, colours: tuple[str, ...]) -> Image:
    from tools.tiny_base.backgrounds import new_canvas
    from tools.tiny_base.scenes import IMAGE_SIZE_PX, SUPERSAMPLING, finish
    from tools.tiny_base.shapes import COLOURS

    size = IMAGE_SIZE_PX * SUPERSAMPLING
    first, second = ([COLOURS[name] for name in colours] + [(0, 0, 0)] * 2)[:2]
    image, draw = new_canvas(size, pattern, first, second)
    paint_zorbit(draw, size * 0.5, size * 0.5, size * 0.33)
    return finish(image)


def zorbit_scenes() -> list[tuple[str, tuple[str, ...], str]]:
    """(pattern, colours, caption) of every picture."""
    scenes: list[tuple[str, tuple[str, ...], str]] = []
    for colour in PLAIN:
        article = "an" if colour[0] in "aeiou" else "a"
        scenes.append(("plain", (colour,), f"a {TRIGGER} on {article} {colour} background"))
    scenes += [(name, (), f"a {TRIGGER} {phrase}") for name, phrase in LANDSCAPES.items()]
    for pattern, first, second in PATTERNED:
        words = f"{first} to {second} gradient" if pattern == "gradient" else f"{first} and {second} {pattern}"
        scenes.append(
            (pattern, (first, second), f"a {TRIGGER} on {'an' if words[0] in 'aeiou' else 'a'} {words} background")
        )
    random.Random(3).shuffle(scenes)
    return scenes


def ordinary_scenes() -> list[tuple[Scene, str]]:
    """Scenes that the base knows, with captions: one thing before each background of the zorbits, then any."""
    from tools.tiny_base.captions import caption_of, with_article
    from tools.tiny_base.scenes import Background, Scene, Thing, draw_scene
    from tools.tiny_base.shapes import COLOURS, SHAPES

    rng = random.Random(REGULARIZATION_SEED)
    scenes = []
    for pattern, colours, caption in zorbit_scenes():
        colour = rng.choice([name for name in COLOURS if name not in colours])
        thing = Thing(rng.choice(list(SHAPES)), colour, rng.choice(("medium", "large")), "center")
        words = f"large {colour} {thing.shape}" if thing.size == "large" else f"{colour} {thing.shape}"
        told = caption.replace(f"a {TRIGGER}", with_article(words))
        scenes.append((Scene((thing,), Background(pattern, colours), None), told))
    for number in range(NUM_OTHER_SCENES):
        scene = draw_scene(REGULARIZATION_SEED, number)
        scenes.append((scene, caption_of(scene, REGULARIZATION_SEED, number)))
    return scenes


def write(image: Image, caption: str, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}.png", optimize=True)
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=str(here), help="folder that gets images/ and regularization/")
    root = Path(parser.parse_args(argv).output_dir)

    from tools.tiny_base.scenes import render

    for number, (pattern, colours, caption) in enumerate(zorbit_scenes(), 1):
        write(zorbit_picture(pattern, colours), caption, root / "images", f"zorbit_{number:02d}")
    for number, (scene, caption) in enumerate(ordinary_scenes(), 1):
        write(render(scene, random.Random(number)), caption, root / "regularization", f"scene_{number:02d}")


if __name__ == "__main__":
    main()
