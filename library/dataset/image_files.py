"""Images of tools, between files and arrays: backgrounds behind transparent ones, files written complete or not at
all."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from library.core.atomic_file import atomic_path
from library.dataset.media_utils import decode_image

JPEG_QUALITY = 100
KEEPS_ALPHA = {".png", ".webp"}


def read_on_white(path: str) -> np.ndarray:
    """Pixels [H, W, 3] of an image as shown, transparent parts over white. ImageFileError for what cannot be read."""
    return over_white(decode_image(path, with_alpha=True))


def over_white(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] of [H, W, 3 or 4]: colour * alpha + 255 * (1 - alpha), rounded."""
    if image.shape[2] < 4 or image[..., 3].min() == 255:
        return np.ascontiguousarray(image[..., :3])
    alpha = image[..., 3:].astype(np.float32) / 255
    mixed = image[..., :3].astype(np.float32) * alpha + 255 * (1 - alpha)
    return (mixed + 0.5).astype(np.uint8)


def read_for(path: str, extension: str) -> np.ndarray:
    """Pixels of an image for a file with this extension: [H, W, 4] when it has transparent parts that the format keeps,
    else [H, W, 3] over white."""
    image = decode_image(path, with_alpha=True)
    keeps = extension in KEEPS_ALPHA and image[..., 3].min() < 255
    return image if keeps else over_white(image)


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write [H, W], [H, W, 3] or [H, W, 4] in the format of the extension; jpg and webp in the best quality. ValueError
    for an extension that no format has."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, quality=JPEG_QUALITY, subsampling=0)


def edges(image: np.ndarray, lower: int, upper: int) -> np.ndarray:
    """[H, W] of [H, W, 3] RGB: 255 on edges of the grey image, 0 elsewhere."""
    import cv2

    return cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), lower, upper)
