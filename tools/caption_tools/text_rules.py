"""Rules that clean tags and captions. Text in, text out."""

from __future__ import annotations

import re

SMILE = "^_^"
_WORD = r"[\w\-]+"
CONTRADICTING = tuple(
    re.compile(pattern)
    for pattern in (
        r"(long|short|medium) hair",
        r"(bob|hime) cut",
        rf"{_WORD} eyes",
        rf"{_WORD} sleeves|sleeveless",
        rf"ponytail|braid|ahoge|twintails|{_WORD} bun|single hair bun|single side bun|two side up|two tails|{_WORD} braid|sidelocks",
    )
)
"""tags that say of one person what is said otherwise of another, where there are several"""
HAIR_LENGTH = CONTRADICTING[0]
HAIR = re.compile(rf"{_WORD} hair")
LONE_WORD = re.compile(rf"{_WORD}|hair ornament")

CAPTION_PAIRS: tuple[tuple[str, str], ...] = (
    ("anime anime", "anime"), ("young ", ""), ("anime girl", "girl"),
    ("cartoon female", "girl"), ("cartoon lady", "girl"), ("cartoon character", "girl"), ("cartoon woman", "girl"),
    ("cartoon women", "girls"),
    ("cartoon girl", "girl"),
    ("anime female", "girl"), ("anime lady", "girl"), ("anime character", "girl"), ("anime woman", "girl"),
    ("anime women", "girls"),
    ("lady", "girl"), ("female", "girl"), ("woman", "girl"), ("women", "girls"), ("people", "girls"),
    ("person", "girl"),
    ("a cartoon figure", "a figure"), ("a cartoon image", "an image"), ("a cartoon picture", "a picture"),
    ("an anime cartoon image", "an image"), ("a cartoon anime drawing", "a drawing"),
    ("a cartoon drawing", "a drawing"),
    ("girl girl", "girl"),
)  # fmt: skip


# -- tags --------------------------------------------------------------------------------------------------------------


def clean_tags(text: str) -> str:
    """Tags with `, ` between them: spaces for underscores, nothing from the rating on, no contradictions, no
    repetitions."""
    text = text.split(", rating")[0]
    tags = [spaced(tag.strip()) for tag in text.split(",") if tag.strip()]
    if any("girls" in tag or "boys" in tag for tag in tags):
        tags = without_contradictions(tags)
    return ", ".join(without_plain_words(tags))


def spaced(tag: str) -> str:
    """Spaces for underscores, but for the smile."""
    return SMILE.join(part.replace("_", " ") for part in tag.split(SMILE))


def without_contradictions(tags: list[str]) -> list[str]:
    """Of several people: kinds of tags that are there more than once go; a length of hair that is the only one
    stays."""
    for pattern in CONTRADICTING:
        if sum(bool(pattern.fullmatch(tag)) for tag in tags) > 1:
            tags = [tag for tag in tags if not pattern.fullmatch(tag)]
    hair = [tag for tag in tags if HAIR.fullmatch(tag) and not HAIR_LENGTH.fullmatch(tag)]
    return [tag for tag in tags if tag not in hair] if len(hair) > 1 else tags


def without_plain_words(tags: list[str]) -> list[str]:
    """`shirt` goes where there is a `white shirt`."""
    plain = {tag for tag in tags if LONE_WORD.fullmatch(tag) and any(other.endswith(f" {tag}") for other in tags)}
    return [tag for tag in tags if tag not in plain]


# -- captions ----------------------------------------------------------------------------------------------------------


def clean_caption(text: str) -> str:
    """A caption with the replacements of CAPTION_PAIRS in turn, each until nothing changes, on whole words."""
    for old, new in CAPTION_PAIRS:
        end = "" if old.endswith(" ") else r"(?!\w)"
        pattern = re.compile(rf"(?<!\w){re.escape(old)}{end}")
        while (changed := pattern.sub(new, text)) != text:
            text = changed
    return text


_QUOTED = r"(?:\"[^\"]*\"|'[^']*')"
_NAMED = rf"(?:{_QUOTED}|{_WORD})"
WRITTEN = tuple(
    re.compile(pattern)
    for pattern in (  # a longer phrase stands before the shorter one that it begins with
        rf"\s*(?:\bwith a sign )?\bthat says the word {_NAMED} on it",
        r"\s*\bthat says ?'the word \"(?: on it)?",
        rf"\s*\b(?:has|with|and) the (?:words?|letters?|name) {_NAMED}(?: (?:is )?(?:on|in) (?:the|her|their|him) \w+)?",
        rf"\s*(?:\bwith a sign )?\bthat says ?{_NAMED}(?: on it)?",
        r"\s*\bwith the number \d+ (?:on it|\w+ \w+)",
        r"\s*\bwith the words \"",
        rf"\s*\bword {_NAMED} on it",
    )
)
"""phrases about letters in a picture, which models read wrongly"""


def without_written_words(caption: str) -> str:
    """A caption without what it tells of words and numbers that are written in the picture."""
    for pattern in WRITTEN:
        caption = pattern.sub("", caption)
    return re.sub(r"\s+", " ", caption).strip()
