"""Prompts with choices: `{A|B}` one of them, `{2$$A|B|C}` or `{1-2$$ and $$A|B|C}` several, `{e$$A|B}` each in turn.

Groups nest; the innermost are resolved first. `\\{` and `\\}` are literal braces.
"""

from __future__ import annotations

import random
import re

from library.core.errors import ConfigError
from library.core.keyed_random import keyed_random

PURPOSE = "dynamic prompt"
SEPARATOR = ", "
MAX_PROMPTS = 10_000
"""prompts that one line may stand for"""

_GROUP = re.compile(r"\{([^{}]*)\}")
_COUNT = re.compile(r"(\d+)(?:-(\d+))?")
# Characters that have a meaning inside a group, hidden while groups are resolved: chosen texts and escaped braces are
# plain text for the group around them.
_HIDDEN = {"\\{": "\ue000", "\\}": "\ue001", "|": "\ue002", "$": "\ue003"}
_SHOWN = {"\ue000": "{", "\ue001": "}", "\ue002": "|", "\ue003": "$"}


def expand_prompt(prompt: str, seed: int) -> list[str]:
    """All prompts that a prompt stands for: one, or with `{e$$...}` one per combination.

    Choices come from a generator of `seed`, the image's seed; every combination starts from the same generator, as it
    is an image with the same seed. Raises ConfigError for an unclosed brace, a count that the group cannot give, an
    unknown word before `$$`, or more than 10,000 prompts.
    """
    text = prompt.replace("\\{", _HIDDEN["\\{"]).replace("\\}", _HIDDEN["\\}"])
    waiting = [(text, keyed_random(seed, PURPOSE))]
    prompts: list[str] = []
    while waiting:
        text, rng = waiting.pop()
        group = _GROUP.search(text)
        if group is None:
            prompts.append(_shown(text, prompt))
            continue
        variants = _variants(group[1], rng, prompt)
        if len(prompts) + len(waiting) + len(variants) > MAX_PROMPTS:
            raise ConfigError(
                f"the prompt '{prompt}' stands for more than {MAX_PROMPTS} prompts; use fewer {{e$$...}} groups"
            )
        for variant in reversed(variants):  # the first one is taken from the end of the list next
            waiting.append((text[: group.start()] + _hidden(variant) + text[group.end() :], _copy_of(rng)))
    return prompts


def is_dynamic(prompt: str) -> bool:
    """Whether the prompt holds a group."""
    return _GROUP.search(prompt.replace("\\{", "").replace("\\}", "")) is not None


def _variants(inside: str, rng: random.Random, prompt: str) -> list[str]:
    """What may stand for the group: one text that `rng` chose, or all options of an enumeration."""
    *settings, body = inside.split("$$")
    options = body.split("|")
    if not settings:
        return [rng.choice(options)]
    head, separator = settings[0].strip(), settings[1] if len(settings) == 2 else SEPARATOR
    if head == "e" and len(settings) == 1:
        return options
    count = _COUNT.fullmatch(head)
    if count is None or len(settings) > 2:
        raise ConfigError(
            f"the prompt '{prompt}' has the group {{{_plain(inside)}}}; known: {{A|B}}, {{2$$A|B}}, {{1-2$$A|B}},"
            " {2$$ and $$A|B}, {e$$A|B}"
        )
    least, most = int(count[1]), int(count[2] or count[1])
    if not least <= most <= len(options):
        raise ConfigError(
            f"the prompt '{prompt}' asks for {head} of {len(options)} options in {{{_plain(inside)}}};"
            f" a count up to {len(options)}, or a range like 1-{len(options)}, is needed"
        )
    return [separator.join(rng.sample(options, rng.randint(least, most)))]


def _copy_of(rng: random.Random) -> random.Random:
    copy = random.Random()
    copy.setstate(rng.getstate())
    return copy


def _hidden(text: str) -> str:
    return text.replace("|", _HIDDEN["|"]).replace("$", _HIDDEN["$"])


def _plain(text: str) -> str:
    for hidden, shown in _SHOWN.items():
        text = text.replace(hidden, shown)
    return text


def _shown(text: str, prompt: str) -> str:
    """The finished text; ConfigError when a brace is left over."""
    for brace in "{}":
        if brace in text:
            raise ConfigError(
                f"the prompt '{prompt}' has a '{brace}' without its other half; write \\{brace} for a brace as text"
            )
    return _plain(text)
