"""Seeds that are words: any text is a number, the same on every machine."""

from __future__ import annotations

import argparse
import hashlib
import math

BITS = 32
ZERO_DIGIT = 0.31415
"""stands for the digit 0 where digits are multiplied"""
FALLBACK = 314159


def string_to_seed(text: str, bits: int = BITS) -> int:
    """A number of so many bits, as the known scripts make it: the SHA-256 of the text less a number that runs through
    its characters. Where that one is not finite, another that every text has takes its place."""
    digest = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")
    walked = _walked(text)
    if not math.isfinite(walked):
        walked = len(text) + FALLBACK * ord(text[len(text) // 2]) - ord(text[len(text) // 4])
    return abs(digest - int(walked)) & (2**bits - 1)


def _walked(text: str) -> float:
    value = 0.0
    for index, character in enumerate(text):
        code = ord(character)
        if index % 2 == 0:
            value += code
        elif index % 3 == 0:
            value -= code
        elif index % 5 == 0:
            value /= code or 1
        else:
            for digit in str(code):
                value *= int(digit) or ZERO_DIGIT
    return value


class NoSeed(ValueError, argparse.ArgumentTypeError):
    """A blank text. Readers of command lines show what the second kind says, those of prompt lines the first."""


def seed_of(text: str | int) -> int:
    """The number that a text of digits says, or that of any other text. NoSeed for a blank one."""
    if isinstance(text, int):
        return text
    stripped = text.strip()
    if not stripped:
        raise NoSeed("a number or a text is needed, e.g. 42")
    try:
        return int(stripped) if stripped.lstrip("+-").isascii() else string_to_seed(text)
    except ValueError:
        return string_to_seed(text)
