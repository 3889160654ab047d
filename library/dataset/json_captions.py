"""Captions as JSON files: an object of tags by category, and a text.

{"quality": "masterpiece", "character": ["zorbit"], "tags": ["hat", "smile"], "nl": "A zorbit with a hat."}
"""

from __future__ import annotations

import functools
import json
import logging
import random
from dataclasses import dataclass
from typing import Any

from library.core.errors import ConfigError, did_you_mean
from library.core.text_files import parse_json, unique_keys

logger = logging.getLogger(__name__)

FIXED = ("trigger", "quality", "count", "character", "series", "artist")
"""categories whose tags all stay where they are, in the order of the caption"""
FREE = ("appearance", "tags", "environment")
"""categories behind them, whose tags are shuffled among themselves and dropped"""
PROSE = "nl"
"""the text at the end"""


@dataclass(frozen=True)
class TagsByCategory:
    """A caption. A tag that two categories have is only in the first of them."""

    fixed: tuple[str, ...]
    free: tuple[tuple[str, ...], ...]
    """one entry for each category of FREE"""
    prose: str

    @property
    def tags(self) -> tuple[str, ...]:
        return (*self.fixed, *(tag for category in self.free for tag in category))

    def compose(
        self, joint: str, rng: random.Random, *, shuffle: bool, dropout: float, limit: int | None = None
    ) -> str:
        """The tags, and behind them the text after a full stop. `limit`: how many free tags there are at most, before
        they are shuffled; each is left out with the probability `dropout`, but one stays."""
        left = sum(map(len, self.free)) if limit is None else limit
        tags: list[str] = []
        for category in self.free:
            chosen = list(category[:left])
            left -= len(chosen)
            if shuffle:
                rng.shuffle(chosen)
            tags += chosen
        if dropout > 0 and tags:
            kept = [tag for tag in tags if rng.random() >= dropout]
            tags = kept or [rng.choice(tags)]
        text = joint.join([*self.fixed, *tags])
        return f"{text}. {self.prose}" if text and self.prose else text or self.prose


def caption_of_json(text: str, path: str) -> str:
    """The raw caption in the text of a JSON file: the object in one line, "" when there is nothing in it. ConfigError
    with the path when it is none."""
    values = parse_json(text, path, pairs_hook=unique_keys)
    if not isinstance(values, dict):
        raise ConfigError(f'{path} is no caption; needed: an object such as {{"tags": ["hat"], "nl": "A hat."}}')
    known = (*FIXED, *FREE, PROSE)
    for name, value in values.items():
        if name not in known:
            _warn_of_entry(name)
        elif not _is_tags(value):
            given = json.dumps(value, ensure_ascii=False)
            raise ConfigError(f"{path} has the entry {name} {given}; needed: a text or a list of texts")
    kept = {name: value for name, value in values.items() if name in known}
    caption = json.dumps(kept, ensure_ascii=False)
    parsed = parsed_caption(caption)
    return caption if parsed is not None and (parsed.tags or parsed.prose) else ""


@functools.lru_cache(maxsize=None)
def _warn_of_entry(name: str) -> None:
    """Once for each name: the files of a folder have the same ones."""
    known = (*FIXED, *FREE, PROSE)
    logger.warning(
        "captions in JSON: the entry '%s' is not read%s (known: %s)", name, did_you_mean(name, known), ", ".join(known)
    )


def _is_tags(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(item is None or (isinstance(item, (str, int)) and not isinstance(item, bool)) for item in items)


@functools.lru_cache(maxsize=65536)
def parsed_caption(caption: str) -> TagsByCategory | None:
    """The parts of a raw caption; None for one that is no JSON object, as of a text file beside JSON files."""
    if not caption.startswith("{"):
        return None
    try:
        values = json.loads(caption)
    except ValueError:
        return None
    seen: set[str] = set()

    def tags_of(name: str) -> tuple[str, ...]:
        new = [tag for tag in dict.fromkeys(_split(values.get(name))) if tag not in seen]
        seen.update(new)
        return tuple(new)

    fixed = tuple(tag for name in FIXED for tag in tags_of(name))
    free = tuple(tags_of(name) for name in FREE)
    prose = values.get(PROSE)
    texts = [str(text) for text in (prose if isinstance(prose, list) else [prose]) if text is not None]
    return TagsByCategory(fixed, free, " ".join(line.strip() for text in texts for line in text.splitlines()).strip())


def _split(value: Any) -> list[str]:
    """The tags of an entry: each text of a list, or those between the commas of one text."""
    if value is None:
        return []
    items = value if isinstance(value, list) else str(value).split(",")
    return [tag for tag in (str(item).strip() for item in items if item is not None) if tag]
