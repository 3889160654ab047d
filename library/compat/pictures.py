"""Pictures as arrays."""

from __future__ import annotations

import numpy as np
from PIL import Image


def pil_resize(image: np.ndarray, size: tuple[int, int], interpolation: int = Image.Resampling.LANCZOS) -> np.ndarray:
    """[height, width, C] scaled to (width, height) by a filter of Pillow."""
    return np.asarray(Image.fromarray(image).resize(size, interpolation))
