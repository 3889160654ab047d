"""What the first bytes of an image file tell: its size as shown, transparency, depth; without decoding a pixel.

`imagesize` reads the sizes of the common cases. Whatever turns a picture (EXIF, XMP) or is rare is left to Pillow's
header, so that the size is always the one that decoding gives. A file whose end is missing, or whose format says
nothing of its end, is read in full: a picture that broke off is known before anything is trained.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from pathlib import Path

import imagesize
from PIL import Image

from library.core.text_files import open_descriptor
from library.dataset.cache_index import CacheIndex
from library.dataset.media_utils import (
    DEEP_MODES,
    ImageCheck,
    ImageFileError,
    Size,
    has_alpha,
    opened_image,
    shown_size,
    verify_image,
)

HEAD_BYTES = 16 * 1024
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_DEEP_GREY = (16, 0)  # bit depth and colour type of what Pillow opens with more than 8 bits
PNG_ALPHA_TYPES = (4, 6)
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
JPEG_EXIF, JPEG_SCAN = 0xE1, 0xDA
HEADER_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "AVIF", "JXL")
"""of which a sound header vouches for the rest, as far as can be told cheaply; others are read in full"""
FLAGS = ("deep", "transparent", "black", "invisible")
QUESTION = "what the header of a picture tells"


def look_at_noted_image(path: str, index: CacheIndex) -> ImageCheck:
    """`look_at_image`, of which an index may know the result from an earlier start: then the file is not opened."""

    def look() -> tuple[str, str]:
        check = look_at_image(path)
        return " ".join(map(str, (*check.size, *(int(getattr(check, name)) for name in FLAGS)))), ""

    return _as_noted(index.find(path, QUESTION, look)[0])


@functools.lru_cache(maxsize=4096)
def _as_noted(text: str) -> ImageCheck:
    width, height, *flags = map(int, text.split())
    return ImageCheck((width, height), **dict(zip(FLAGS, map(bool, flags))))


def look_at_image(path: str | Path) -> ImageCheck:
    """Size, depth and transparency of an image from its header. Raises ImageFileError for what is empty, no image or
    broken off.

    Damage in the middle of a file shows only when it is decoded (`verify_image`).
    """
    try:
        descriptor, status = open_descriptor(path)
        num_bytes = status.st_size
        try:
            head = os.read(descriptor, HEAD_BYTES)
            found = _from_head(descriptor, head, num_bytes)
        finally:
            os.close(descriptor)
    except OSError:
        head, num_bytes, found = b"", 0, None  # what follows has the message
    if found is not None:
        return found
    with opened_image(path) as image:
        size = shown_size(image, path)
        if image.format in HEADER_FORMATS and not _is_cut(path, head, num_bytes):
            return _check(size, image.mode in DEEP_MODES, has_alpha(image))
    return verify_image(path)


_check = functools.lru_cache(maxsize=4096)(ImageCheck)
"""pictures of one size and kind share a record"""


def _from_head(descriptor: int, head: bytes, num_bytes: int) -> ImageCheck | None:
    """The common cases; None: Pillow is to look."""
    if head.startswith(PNG_START):
        return _png(descriptor, head, num_bytes)
    if head.startswith(JPEG_START):
        plain = _is_plain_jpeg(head) and _ends_with(descriptor, JPEG_END, num_bytes)
    else:
        plain = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8 " and _webp_bytes(head) <= num_bytes
    size = _stored_size(head) if plain else None
    return None if size is None else _check(size)


def _stored_size(head: bytes) -> Size | None:
    """Width and height as imagesize finds them; None where it does not."""
    try:
        return _sound(imagesize.get(io.BytesIO(head)))
    except (ValueError, struct.error, IndexError):  # what versions before 2 raise
        return None


def _sound(size: Size) -> Size | None:
    """None for sizes that Pillow refuses, with a message."""
    width, height = size
    return (
        (width, height)
        if width > 0 and height > 0 and width * height <= 2 * (Image.MAX_IMAGE_PIXELS or 1 << 60)
        else None
    )


def _png(descriptor: int, head: bytes, num_bytes: int) -> ImageCheck | None:
    """A PNG whose first chunk is sound, whose last one is there and which nothing turns."""
    if len(head) < 33 or head[12:16] != b"IHDR" or zlib.crc32(head[12:29]) != int.from_bytes(head[29:33], "big"):
        return None
    chunks = _png_chunks(descriptor, head, num_bytes)
    width, height, depth, colour = struct.unpack_from(">IIBB", head, 16)
    size = _sound((width, height))
    if size is None or "eXIf" in chunks or "IEND" not in chunks:
        return None
    return _check(size, (depth, colour) == PNG_DEEP_GREY, colour in PNG_ALPHA_TYPES or "tRNS" in chunks)


def _png_chunks(descriptor: int, head: bytes, num_bytes: int) -> set[str]:
    """Names of the chunks up to IEND, or up to where the file breaks off. EXIF may also stand after the pixels."""
    names: set[str] = set()
    position = len(PNG_START)
    while position + 12 <= num_bytes and "IEND" not in names:
        if position + 8 <= len(head):
            length, name = struct.unpack_from(">I4s", head, position)
        else:
            os.lseek(descriptor, position, os.SEEK_SET)
            length, name = struct.unpack(">I4s", os.read(descriptor, 8))
        names.add(name.decode("latin-1"))
        position += 12 + length
    return names if position <= num_bytes else names - {"IEND"}


def _is_plain_jpeg(head: bytes) -> bool:
    """Whether all segments before the pixels lie in the head, none of them EXIF or XMP."""
    position = 2
    while position + 4 <= len(head) and head[position] == 0xFF:
        marker = head[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker == JPEG_SCAN:
            return True
        elif marker == JPEG_EXIF:
            return False
        else:
            position += 2 + int.from_bytes(head[position + 2 : position + 4], "big")
    return False


def _ends_with(descriptor: int, end: bytes, num_bytes: int) -> bool:
    os.lseek(descriptor, max(num_bytes - len(end), 0), os.SEEK_SET)
    return os.read(descriptor, len(end)) == end


def _webp_bytes(head: bytes) -> int:
    """Length of the file as its own header has it."""
    return int.from_bytes(head[4:8], "little") + 8


def _is_cut(path: str | Path, head: bytes, num_bytes: int) -> bool:
    """Whether the end of a file is missing, as far as its format says where that is."""
    with open(path, "rb", buffering=0) as file:
        if head.startswith(PNG_START):
            return "IEND" not in _png_chunks(file.fileno(), head, num_bytes)
        if head.startswith(JPEG_START):
            return not _ends_with(file.fileno(), JPEG_END, num_bytes)
    if head[:4] == b"RIFF":
        return _webp_bytes(head) > num_bytes
    return head[:2] == b"BM" and int.from_bytes(head[2:6], "little") > num_bytes


__all__ = ["ImageFileError", "look_at_image", "look_at_noted_image"]
