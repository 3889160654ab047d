"""Pictures that were made from prompts, as files that tell how: samples of a training and those of image scripts
alike."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from library.core.atomic_file import atomic_path
from library.core.console import storable

if TYPE_CHECKING:
    from PIL import Image

Picture = Union["Image.Image", Sequence["Image.Image"]]
"""a picture, or the frames of a clip"""
FRAMES_PER_SECOND = 16
"""of clips whose family says nothing of a rate, and of animated pictures"""


def allow_long_texts() -> None:
    """Let Pillow open pictures whose packed texts are long (a workflow, say): without it a text of more than 1 MB is an
    error. The sum of all texts stays limited to its 64 MB."""
    from PIL import PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def settings_texts(
    *, prompt: str, negative_prompt: str | None, seed: int | None, steps: int | None, scale: float | None, **more: Any
) -> dict[str, str]:
    """Text entries of a picture file, under the names that readers know: prompt, negative-prompt, seed, steps, scale.
    What is None is left out."""
    entries = {
        "prompt": prompt,
        "negative-prompt": negative_prompt,
        "seed": seed,
        "steps": steps,
        "scale": scale,
        **more,
    }
    return {name: str(value) for name, value in entries.items() if value is not None}


def write_picture(picture: Picture, path: Path, texts: Mapping[str, str] | None = None) -> Path:
    """A PNG with its text entries, complete or not at all; the folder is made when missing. Several frames are an
    animated PNG, of which readers of pictures see the first frame."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, storable(text))
    first, *others = frames_of(picture)
    with atomic_path(path) as temporary:
        first.save(temporary, format="PNG", pnginfo=info, **(_animation(others) if others else {}))
    return path


def _animation(others: Sequence[Image.Image], fps: float = FRAMES_PER_SECOND) -> dict[str, Any]:
    """Arguments of Pillow's `save` for the frames after the first."""
    return {"save_all": True, "append_images": list(others), "duration": 1000 / fps, "loop": 0}


def frames_of(picture: Picture) -> list[Image.Image]:
    """The frames of a clip; a picture is one."""
    from PIL import Image

    return [picture] if isinstance(picture, Image.Image) else list(picture)


def read_frames(path: str | os.PathLike[str]) -> list[Image.Image]:
    """All frames of a file as RGB."""
    from PIL import Image, ImageSequence

    allow_long_texts()
    with Image.open(path) as image:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]


def gif_of(frames: Sequence[Image.Image], fps: float) -> bytes:
    """Frames as a GIF, the form in which TensorBoard takes what moves."""
    file = io.BytesIO()
    frames[0].save(file, format="GIF", **_animation(frames[1:], fps))
    return file.getvalue()


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text entries of a picture file; none for a file that is no picture or has none."""
    from PIL import Image

    allow_long_texts()
    try:
        with Image.open(path) as image:
            return {str(name): str(text) for name, text in getattr(image, "text", {}).items()}
    except Exception:  # Pillow raises nearly anything for damaged files
        return {}
