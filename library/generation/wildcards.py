"""Wildcards of prompts: `__name__` stands for a line of `name.txt` in a folder, drawn by the seed of the picture.

A line is `text` or `text:WEIGHT`; lines may hold wildcards themselves. Blank lines, and those that begin with #, do not
count. The names of files may have folders before them: `__colors/autumn__`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.core.keyed_random import keyed_random
from library.core.text_files import read_text
from library.generation.requests import PictureRequest, Request, taken_seed

MARKER = re.compile(r"__([A-Za-z0-9][A-Za-z0-9_./ -]*?)__")
PROMPT_FIELDS = ("prompt", "negative_prompt", "prompt2", "prompt_2", "nag_prompt")
"""fields of requests that hold texts, as far as a request has them"""
MOST_ROUNDS = 50
"""how deep wildcards may stand in each other"""
LONGEST = 100_000
"""characters that no prompt has: of a line that holds its own wildcard twice each round makes two"""
PURPOSE = "prompt wildcards"


@dataclass(frozen=True)
class Wildcards:
    """The files of --prompt_wildcards."""

    folder: str

    def entries(self, name: str) -> list[tuple[str, float]]:
        """Texts and weights of a file. ConfigError."""
        path = Path(self.folder) / f"{name}.txt"
        where = f"the prompt has __{name}__"
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(
                f"{where}, which leaves the folder of --prompt_wildcards; needed: a name in {self.folder}"
            )
        if not path.is_file():
            raise ConfigError(f"{where}, and there is no {path}; make that file, or leave --prompt_wildcards out")
        lines = [line.strip() for line in read_text(str(path), f"{where}, whose file {path}").splitlines()]
        found = [_entry(line, str(path)) for line in lines if line and not line.startswith("#")]
        if not any(weight for _, weight in found):
            raise ConfigError(f"{where}, and {path} has no line that can be drawn; write one text in each line")
        return found

    def expanded(self, text: str, seed: int, what: str = "") -> str:
        """The text with a draw for each wildcard; the same for the same seed and `what` it is. ConfigError."""
        rng = keyed_random(seed, PURPOSE, what)

        def drawn(match: re.Match[str]) -> str:
            texts, weights = zip(*self.entries(match[1]))
            return rng.choices(texts, weights)[0]

        for _ in range(MOST_ROUNDS):
            if not MARKER.search(text):
                return text
            text = MARKER.sub(drawn, text)
            if len(text) > LONGEST:
                break
        raise ConfigError(
            f"the wildcards of the prompt stand in each other more than {MOST_ROUNDS} deep, or make more than {LONGEST}"
            f" characters (now: {text[:80]}); one of them"
            " leads back to itself"
        )

    def problems(self, text: str | None) -> list[str]:
        """What is wrong with files that this text, or what may be drawn for it, names."""
        problems, seen, waiting = [], set(), MARKER.findall(text or "")
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            try:
                waiting += [inner for entry, _ in self.entries(name) for inner in MARKER.findall(entry)]
            except ConfigError as error:
                problems += error.problems
        return problems


def _entry(line: str, path: str) -> tuple[str, float]:
    """`text:WEIGHT`: a weight only behind the last colon, and only where it is a number; the text may stand in
    quotes."""
    text, colon, number = line.rpartition(":")
    weight = _number(number) if colon else None
    if weight is None:
        return _unquoted(line), 1.0
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"{path} has the line '{line}'; a weight is 0 or more, e.g. {_unquoted(text)}:2")
    return _unquoted(text), weight


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


# -- in requests -------------------------------------------------------------------------------------------------------


def prompts_of(request: PictureRequest) -> dict[str, str]:
    """The texts of a request that wildcards may stand in, by their fields."""
    found = {name: getattr(request, name, None) for name in PROMPT_FIELDS}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def wildcard_problems(request: PictureRequest, folder: str) -> list[str]:
    return [problem for text in prompts_of(request).values() for problem in Wildcards(folder).problems(text)]


def with_drawn_words(requests: Iterable[Request], folder: str | None) -> Iterable[Request]:
    """Requests whose wildcards are drawn, by their seeds. ConfigError; what is typed is drawn as it comes."""
    if folder is None:
        return requests

    def drawn(request: Request) -> Request:
        seed = taken_seed(request)
        texts = {name: Wildcards(folder).expanded(text, seed, name) for name, text in prompts_of(request).items()}
        return dataclasses.replace(request, seed=seed, **texts)

    return list(map(drawn, requests)) if isinstance(requests, Sequence) else map(drawn, requests)
