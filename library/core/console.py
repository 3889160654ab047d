"""Output that every console can show, and texts that every file can hold."""

from __future__ import annotations

import os
import sys

from library.core.errors import ConfigError


def make_console_safe() -> None:
    """Let letters that the console's encoding lacks (an emoji on cp1252, anything but English under LC_ALL=C) be
    written as escapes, where they would be an error."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def storable(text: str) -> str:
    """The text with bytes of file names that are not UTF-8 as escapes: Python carries them as half surrogate pairs,
    which no encoding can hold. In JSON the escape means the same, so that names come back as they were."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def utf8_text(text: str, what: str) -> str:
    """A text from the command line or the keyboard as what its bytes are in UTF-8, whatever the locale says: under
    LC_ALL=C Python carries every letter beyond ASCII as half surrogate pairs. ConfigError when they are no UTF-8."""
    if not any("\udc80" <= letter <= "\udcff" for letter in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} is not UTF-8 text ({storable(text)}); set the terminal to UTF-8, or use a file"
        ) from error
