"""Pictures that were made from prompts, as files that tell how: samples of a training and those of image scripts
alike."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from library.core.atomic_file import atomic_path
from library.core.console import storable
from library.core.errors import ConfigError
from library.generation.file_options import DEFAULT_QUALITY

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Picture = Union["Image.Image", Sequence["Image.Image"]]
"""a picture, or the frames of a clip"""
FRAMES_PER_SECOND = 16
"""of clips whose family says nothing of a rate, and of animated pictures"""
_FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_PLAIN, _WIDE = b"ASCII\0\0\0", b"UNICODE\0"
"""what a comment of EXIF begins with: letters of ASCII, and UTF-16 (big endian, as other programs write and read it)"""
MOST_EXIF = 65_000
"""bytes of a comment; a block of a JPEG file has no room for more"""


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


def write_picture(
    picture: Picture, path: Path, texts: Mapping[str, str] | None = None, quality: int = DEFAULT_QUALITY
) -> Path:
    """A PNG, WebP or JPEG file, by its ending, with its text entries, complete or not at all; the folder is made when
    missing. `quality`: 1 to 100, of WebP (100: lossless) and JPEG.

    Several frames are an animated picture, of which readers of pictures see the first frame. ConfigError for another
    ending, and for several frames of JPEG.
    """
    kind = _FORMATS.get(path.suffix.lower())
    first, *others = frames_of(picture)
    if kind is None:
        raise ConfigError(f"{path} is no picture file; needed: one that ends in {', '.join(_FORMATS)}")
    if kind == "JPEG" and others:
        raise ConfigError(f"{path}: a JPEG file holds one picture, not {len(others) + 1} frames; needed: .png or .webp")
    kept = {name: storable(text) for name, text in (texts or {}).items()}
    how = _png_texts(kept) if kind == "PNG" else _lossy(kind, kept, quality, path)
    with atomic_path(path) as temporary:
        first.save(temporary, format=kind, **how, **(_animation(others) if others else {}))
    return path


def _png_texts(texts: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of Pillow's `save`: one international text for each entry."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return {"pnginfo": info}


def _lossy(kind: str, texts: Mapping[str, str], quality: int, path: Path) -> dict[str, Any]:
    """Arguments of Pillow's `save` for WebP and JPEG: the entries as JSON in the comment of the EXIF data."""
    how: dict[str, Any] = {"quality": quality}
    how |= {"subsampling": 0} if kind == "JPEG" else {"lossless": quality == 100, "method": 4}
    comment = exif_comment(texts)
    if len(comment) > MOST_EXIF:
        logger.warning("%s: the settings have %d bytes, for which EXIF has no room; left out", path, len(comment))
    elif texts:
        from PIL import Image

        exif = Image.Exif()
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = comment
        how["exif"] = exif
    return how


def exif_comment(texts: Mapping[str, str]) -> bytes:
    """Entries as the value of the tag UserComment."""
    text = json.dumps(dict(texts), ensure_ascii=False, sort_keys=True)
    return _PLAIN + text.encode("ascii") if text.isascii() else _WIDE + text.encode("utf-16-be", "surrogatepass")


def comment_texts(comment: str) -> dict[str, str]:
    """Entries of a comment that is a JSON object; another comment is the one entry `comment`."""
    try:
        found = json.loads(comment)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return {"comment": comment} if comment.strip() else {}
    return {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """Entries of the comment in the EXIF data of a picture."""
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    if isinstance(comment, str):
        return comment_texts(comment)
    kind, content = comment[:8], comment[8:]
    if kind != _WIDE:
        return comment_texts(content.decode("utf-8", "replace").strip("\0"))
    either = [content.decode(name, "replace") for name in ("utf-16-be", "utf-16-le")]
    # which end comes first is not told: letters of a script lie close together when it is right
    return comment_texts(min(either, key=lambda text: sum(map(ord, text))))


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


def image_texts(image: Image.Image) -> dict[str, str]:
    """The text entries of an open picture file."""
    try:
        texts = getattr(image, "text", {})
    except Exception:  # the pixels are cut off or damaged, which Pillow reads before; most writers set texts before them
        texts = {name: text for name, text in image.info.items() if isinstance(text, str)}
    return {str(name): str(text) for name, text in (texts or _exif_texts(image)).items()}


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text entries of a picture file: those of PNG, and of the comment in EXIF data; none for a file that is no
    picture or has none."""
    from PIL import Image

    allow_long_texts()
    try:
        with Image.open(path) as image:
            return image_texts(image)
    except Exception:  # Pillow raises nearly anything for damaged files
        return {}
