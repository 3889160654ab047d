"""Videos for tests, drawn by code: every frame carries its number in blocks, as those of the reference files do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (64, 32)
"""(width, height): eight blocks of 16 x 16"""


def numbered_frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """[H, W, 3]: blocks row by row, highest bit first, white = 1."""
    bits = np.array([(number >> place) & 1 for place in range(7, -1, -1)], dtype=np.uint8).reshape(2, 4) * 255
    width, height = size
    blocks = np.kron(bits, np.ones((height // 2, width // 4), dtype=np.uint8))
    return np.repeat(blocks[..., None], 3, axis=2)


def number_of(frame: np.ndarray) -> int:
    """The number that a frame [H, W, 3] of any size carries."""
    height, width = frame.shape[:2]
    middles = frame[height // 4 :: height // 2, width // 8 :: width // 4].mean(axis=-1)[:2, :4].reshape(-1)
    return int("".join(str(int(middle > 127)) for middle in middles), 2)


def numbers_of(clip: np.ndarray) -> list[int]:
    """Of the frames of a clip [F, H, W, 3]."""
    return [number_of(frame) for frame in clip]


def write_video(path: Path, count: int, fps: float = 24, size: tuple[int, int] = SIZE, first: int = 0) -> Path:
    """Frames numbered from `first`, by OpenCV in Motion JPEG (avi, mkv) or MPEG-4 (mp4)."""
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    codec = "mp4v" if path.suffix == ".mp4" else "MJPG"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, size)
    assert writer.isOpened()
    for number in range(first, first + count):
        writer.write(np.ascontiguousarray(numbered_frame(number, size)[..., ::-1]))
    writer.release()
    return path


def write_frames(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = (SIZE,), first: int = 0) -> Path:
    """A folder of frames, their sizes in turn."""
    folder.mkdir(parents=True)
    for number in range(count):
        frame = numbered_frame(first + number, sizes[number % len(sizes)])
        Image.fromarray(frame).save(folder / f"{number:04d}.png")
    return folder
