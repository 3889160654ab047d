"""Types of the command line's values: what cannot be measured is said before anything is."""

from __future__ import annotations

import argparse
import math
import os


def count(word: str) -> int:
    """A whole number of 1 or more: of rounds, pictures, steps."""
    return _whole(word, 1)


def count_or_none(word: str) -> int:
    """A whole number of 0 or more: of loader workers."""
    return _whole(word, 0)


def _whole(word: str, least: int) -> int:
    try:
        number = int(word)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{word!r} is given; needed: a whole number of {least} or more")
    return number


def amount(word: str) -> float:
    """A number above 0: of minutes, gigabytes."""
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is given; needed: a number above 0")
    return number


def folder(word: str) -> str:
    """A folder that is there and can be written to."""
    if not os.path.isdir(word):
        raise argparse.ArgumentTypeError(f"{word} is given; there is no such folder: make it, or leave the option out")
    if not os.access(word, os.W_OK):
        raise argparse.ArgumentTypeError(f"{word} is given; nothing can be written there")
    return word


def tiny_family(word: str) -> str:
    """A family that has a tiny model."""
    from library.core.errors import ConfigError
    from library.tiny_models import tiny_entry

    try:
        tiny_entry(word)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return word


def figures_file(word: str) -> str:
    """A file that can be written when all is measured."""
    parent = os.path.dirname(os.path.abspath(word))
    if not os.path.isdir(parent):
        raise argparse.ArgumentTypeError(f"{word} is given; there is no such folder: {parent}")
    if os.path.isdir(word):
        raise argparse.ArgumentTypeError(f"{word} is given, and is a folder; needed: a file")
    if not os.access(word if os.path.exists(word) else parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{word} is given; it cannot be written")
    return word
