"""From the probabilities of tags to the tags of an image: thresholds, order, replacements. No image, no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from library.core.errors import ConfigError
from tools.caption_tools.tag_models import Tag

CHOSEN_ONE = ("rating", "quality")
"""categories of which an image has the likeliest tag alone"""
SHORTEST = 3
"""tags of up to so many characters keep their underscores: they are faces such as ^_^"""


@dataclass(frozen=True, kw_only=True)
class TagRules:
    """Which tags are written, and how."""

    thresholds: dict[str, float]
    """category -> least probability"""
    by_probability: bool = False
    remove_underscore: bool = False
    character_tag_expand: bool = False
    character_tags_first: bool = False
    replacements: dict[str, str] = field(default_factory=dict)
    undesired: frozenset[str] = frozenset()
    rating: str | None = None
    """where the rating goes: `first`, `last` or None = it is left out"""
    quality: str | None = None
    always_first: tuple[str, ...] = ()

    def tags_of(self, tags: Sequence[Tag], values: Sequence[float]) -> list[str]:
        """The tags of one image. `values`: the probability of each tag."""
        found = [
            (tag, float(value))
            for tag, value in zip(tags, values)
            if tag.category not in CHOSEN_ONE and value >= self.thresholds[tag.category]
        ]
        if self.by_probability:
            found.sort(key=lambda pair: -pair[1])
        if self.character_tags_first:
            found.sort(key=lambda pair: pair[0].category != "character")  # stable: the order of the others stays
        names = [name for tag, _ in found for name in self.written(tag)]
        for category, place in (("quality", self.quality), ("rating", self.rating)):
            chosen = self.likeliest(tags, values, category) if place else []
            names = chosen + names if place == "first" else names + chosen
        names = list(dict.fromkeys(name for name in names if name not in self.undesired))
        head = [name for name in self.always_first if name in names]
        return head + [name for name in names if name not in head]

    def likeliest(self, tags: Sequence[Tag], values: Sequence[float], category: str) -> list[str]:
        of_category = [(float(value), tag) for tag, value in zip(tags, values) if tag.category == category]
        return self.written(max(of_category, key=lambda pair: pair[0])[1]) if of_category else []

    def written(self, tag: Tag) -> list[str]:
        """A tag as it is written: one text, or two where a character's work is told apart."""
        names = [tag.name]
        if self.character_tag_expand and tag.category == "character":
            names = expanded(tag.name)
        if self.remove_underscore:
            names = [name.replace("_", " ") if len(name) > SHORTEST else name for name in names]
        return [self.replacements.get(name, name) for name in names]


def expanded(name: str) -> list[str]:
    """`name_(work)` -> [`name`, `work`]; of several pairs of brackets the last counts."""
    match = re.fullmatch(r"(.+?)_?\(([^()]+)\)", name)
    return [match[1], match[2]] if match else [name]


def read_replacements(text: str | None) -> dict[str, str]:
    r"""`a,b;c,d` -> {a: b, c: d}; `\,` and `\;` stand for the signs themselves. ConfigError."""
    found = {}
    for pair in re.split(r"(?<!\\);", text or ""):
        if not pair.strip():
            continue
        parts = [part.strip().replace(r"\,", ",").replace(r"\;", ";") for part in re.split(r"(?<!\\),", pair)]
        if len(parts) != 2 or not all(parts):
            raise ConfigError(
                rf"--tag_replacement has '{pair}'; needed: old,new with ; between pairs (\, and \; for the signs themselves)"
            )
        found[parts[0]] = parts[1]
    return found


def split_list(text: str | None, separator: str) -> list[str]:
    """Parts between separators, without the space around them and without empty ones."""
    return [part.strip() for part in (text or "").split(separator.strip() or separator) if part.strip()]
