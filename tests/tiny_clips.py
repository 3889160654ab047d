"""Videos of a moving shape, drawn by code: a concept that a tiny model of clips can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220)}


def moving_shape(frames: int, colour: str, start: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """[F, H, W, 3]: a square on grey that goes to the right, four pixels a frame, and comes in again on the left."""
    width, height = size
    clip = np.full((frames, height, width, 3), 128, dtype=np.uint8)
    for number, frame in enumerate(clip):
        columns = (np.arange(width // 3) + start + 4 * number) % width
        frame[height // 3 : 2 * height // 3, columns] = COLOURS[colour]
    return clip


def write_moving_shapes(
    folder: Path, count: int, frames: int = 9, size: tuple[int, int] = (64, 64), fps: float = 24
) -> Path:
    """`count` videos (Motion JPEG) with captions, of all colours in turn and other starts each; returns the folder."""
    import cv2

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        path = folder / f"{number:02d}.avi"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, size)
        assert writer.isOpened()
        for frame in moving_shape(frames, colour, start=11 * number, size=size):
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()
        path.with_suffix(".txt").write_text(f"a {colour} square", encoding="utf-8")
    return folder
