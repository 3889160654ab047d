"""Captions of scenes: several forms of sentence, synonyms, and the comma-separated form that taggers write."""

from __future__ import annotations

import random

from library.core.keyed_random import keyed_random
from tools.tiny_base.scenes import Background, Scene, Thing

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc", "ball"), "square": ("square", "square", "box"),
    "face": ("face", "smiling face", "smiley"),
    "moon": ("moon", "crescent moon", "crescent"), "cup": ("cup", "cup", "mug"),
    "boat": ("boat", "sailing boat", "ship"),
    "cross": ("cross", "cross", "plus"), "car": ("car", "car", "automobile"), "mushroom": ("mushroom", "toadstool"),
    "house": ("house", "house", "hut"), "flower": ("flower", "flower", "blossom"), "ring": ("ring", "ring", "hoop"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "gray": ("gray", "grey"), "purple": ("purple", "purple", "violet"), "teal": ("teal", "turquoise"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "medium": ("",),
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "center": ("", "", "", "in the center", "in the middle"),
    "left": ("on the left", "at the left side"), "right": ("on the right", "at the right side"),
    "top": ("at the top", "near the top"), "bottom": ("at the bottom", "near the bottom"),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of"), "right of": ("to the right of", "right of"),
    "above": ("above", "over", "on top of"), "below": ("below", "under", "beneath"),
}
LANDSCAPE_PHRASES: dict[str, tuple[str, ...]] = {
    "night": ("in a night sky", "in front of a starry night sky", "at night", "night sky background"),
    "meadow": ("on a meadow", "on green grass under a blue sky", "in a meadow", "meadow background"),
    "beach": ("on a beach", "at the beach", "on the sand by the sea", "beach background"),
    "snow": ("in the snow", "in a snowy landscape", "on white snow", "snow background"),
    "sunset": ("at sunset", "in front of a sunset", "in the evening at sunset", "sunset background"),
}
OPENINGS = (
    "",
    "",
    "",
    "",
    "a picture of ",
    "a drawing of ",
    "an image of ",
    "an illustration of ",
    "a photo of ",
    "this is ",
)
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def word_for(table: dict[str, tuple[str, ...]], name: str, rng: random.Random) -> str:
    """One of the synonyms of a name."""
    return rng.choice(table.get(name, (name,)))


def invented_word(rng: random.Random) -> str:
    """A word that means nothing, such as a trigger word is."""
    syllables = [
        rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(("", "", *CONSONANTS))
        for _ in range(rng.randint(2, 3))
    ]
    return "".join(syllables)


def with_article(words: str) -> str:
    return ("an " if words[0] in VOWELS else "a ") + words


def join_words(*words: str) -> str:
    return " ".join(word for word in words if word)


def thing_words(thing: Thing, rng: random.Random) -> str:
    """`large red circle`"""
    return join_words(
        word_for(SIZE_WORDS, thing.size, rng), word_for(COLOUR_WORDS, thing.colour, rng),
        word_for(SHAPE_WORDS, thing.shape, rng)
    )


def background_words(background: Background, rng: random.Random) -> str:
    """`blue and white striped background`, without an article and a preposition."""
    names = [word_for(COLOUR_WORDS, colour, rng) for colour in background.colours]
    if background.pattern == "plain":
        return f"{rng.choice(('', '', 'plain '))}{names[0]} background"
    if background.pattern == "gradient":
        return f"{names[0]} to {names[1]} gradient background"
    return f"{names[0]} and {names[1]} {background.pattern} background"


def background_phrase(background: Background, rng: random.Random) -> str:
    """`on a blue background`, `at the beach`"""
    if background.pattern in LANDSCAPE_PHRASES:
        return rng.choice(LANDSCAPE_PHRASES[background.pattern][:-1])
    preposition = rng.choice(("on", "on", "in front of", "against"))
    return f"{preposition} {with_article(background_words(background, rng))}"


def tag_for_background(background: Background, rng: random.Random) -> str:
    if background.pattern in LANDSCAPE_PHRASES:
        return LANDSCAPE_PHRASES[background.pattern][-1]
    return background_words(background, rng)


def sentence(scene: Scene, rng: random.Random) -> str:
    """A sentence that tells all of the scene."""
    nouns = [with_article(thing_words(thing, rng)) for thing in scene.things]
    behind = background_phrase(scene.background, rng)
    if scene.relation is not None:
        return f"{rng.choice(OPENINGS)}{nouns[0]} {rng.choice(RELATION_PHRASES[scene.relation])} {nouns[1]} {behind}"
    place = rng.choice(PLACE_PHRASES[scene.things[0].place])
    if rng.random() < 0.15:
        return join_words("there is", nouns[0], place, behind)
    if rng.random() < 0.2:
        return f"{join_words(rng.choice(OPENINGS) + nouns[0], place)}, {tag_for_background(scene.background, rng)}"
    return join_words(rng.choice(OPENINGS) + nouns[0], place, behind)


def tags(scene: Scene, rng: random.Random) -> str:
    """The same as comma-separated tags."""
    parts = [thing_words(thing, rng) for thing in scene.things]
    if scene.relation is not None:
        parts[0] = f"{parts[0]} {scene.relation} {parts.pop(1)}"
    elif scene.things[0].place != "center":
        parts.append(scene.things[0].place)
    return ", ".join([*parts, tag_for_background(scene.background, rng)])


def caption_of(scene: Scene, seed: int, index: int, variant: int = 0) -> str:
    """Caption number `variant` of scene number `index`."""
    rng = keyed_random(seed, "caption", index, variant)
    text = tags(scene, rng) if rng.random() < 0.2 else sentence(scene, rng)
    if rng.random() < 0.04:  # an unknown word may stand for anything; it is not an error
        known = SHAPE_WORDS.get(scene.things[0].shape, (scene.things[0].shape,))
        for word in sorted(known, key=len, reverse=True):
            text = text.replace(word, invented_word(rng), 1)
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:] + rng.choice(("", "."))
    return text


def vocabulary_words() -> list[str]:
    """Every word that a caption can hold, most useful first by the order of the tables."""
    from tools.tiny_base.backgrounds import TWO_COLOURED
    from tools.tiny_base.shapes import COLOURS, SHAPES

    phrases: list[str] = [
        *SHAPES,
        *COLOURS,
        *TWO_COLOURED,
        *OPENINGS,
        "a an on in front of against and to there is plain background",
    ]
    for table in (SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS, PLACE_PHRASES, RELATION_PHRASES, LANDSCAPE_PHRASES):
        phrases += [phrase for entry in table.values() for phrase in entry]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
