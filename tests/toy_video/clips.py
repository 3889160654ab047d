"""Folders of small clips and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from library.generation.picture_files import write_picture


def draw_clip(path: Path, frames: int, size: tuple[int, int] = (32, 32), alpha: bool = False) -> Path:
    """Frames of noise, or a picture when there is one."""
    random = np.random.RandomState(len(path.stem) + 10 * frames + int(path.stem[-1]))
    pixels = random.randint(0, 255, (frames, size[1], size[0], 4 if alpha else 3), dtype=np.uint8)
    return write_picture([Image.fromarray(frame) for frame in pixels], path)


def draw_clips(folder: Path, lengths: Sequence[int]) -> Path:
    """One clip with a caption for each length."""
    for i, frames in enumerate(lengths):
        path = draw_clip(folder / f"{i:02d}.png", frames)
        path.with_suffix(".txt").write_text(f"a red cat runs, number {i}", encoding="utf-8")
    return folder
