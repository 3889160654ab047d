"""Pictures that were made from prompts, as files that tell how: samples of a training and those of image scripts alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.core.atomic_file import atomic_path
from library.core.console import storable

if TYPE_CHECKING:
    from PIL import Image


def allow_long_texts() -> None:
    """Let Pillow open pictures whose packed texts are long (a workflow, say): without it a text of more than 1 MB is an error. The
    sum of all texts stays limited to its 64 MB."""
    from PIL import PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def settings_texts(
    *, prompt: str, negative_prompt: str | None, seed: int | None, steps: int | None, scale: float | None, **more: Any
) -> dict[str, str]:
    """Text entries of a picture file, under the names that readers know: prompt, negative-prompt, seed, steps, scale. What is
    None is left out."""
    entries = {"prompt": prompt, "negative-prompt": negative_prompt, "seed": seed, "steps": steps, "scale": scale, **more}
    return {name: str(value) for name, value in entries.items() if value is not None}


def write_picture(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> Path:
    """A PNG with its text entries, complete or not at all; the folder is made when missing."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, storable(text))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return path


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text entries of a picture file; none for a file that is no picture or has none."""
    from PIL import Image

    allow_long_texts()
    try:
        with Image.open(path) as image:
            return {str(name): str(text) for name, text in getattr(image, "text", {}).items()}
    except Exception:  # Pillow raises nearly anything for damaged files
        return {}
