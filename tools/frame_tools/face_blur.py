"""Faces of pictures and videos blurred, with soft edges: OpenCV's YuNet finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, foreign_errors
from library.core.options import Config, option
from library.scripts.tool_script import tool_exit_code
from tools.frame_tools.processing import FrameProcessor, FrameTool, missing_file

if TYPE_CHECKING:
    import numpy as np

MARGIN = 0.15
"""of a face's box around it, where the blur fades out"""
LARGEST_KERNEL = 999

Box = tuple[float, float, float, float]
"""left, top, width, height"""
Detector = Callable[["np.ndarray"], Sequence[Box]]
"""[H, W, 3] RGB -> boxes of faces"""


@dataclass(frozen=True, kw_only=True)
class FaceBlurOptions:
    """Blurring"""

    model: str | None = option(
        None, help="file of the YuNet detector (face_detection_yunet_2023mar.onnx from OpenCV's collection of models)"
    )
    strength: int = option(51, help="size of the blur's kernel in pixels, made odd", least=1, most=LARGEST_KERNEL)
    sigmax: float = option(40.0, help="standard deviation of the blur in pixels", least=0, most=LARGEST_KERNEL)
    conf: float = option(0.5, help="score from which on something is a face", least=0, most=1)


def problems_of(config: Config) -> Iterator[str]:
    problem = missing_file("model", config[FaceBlurOptions].model, "the file of the YuNet detector, an .onnx file")
    if problem:
        yield problem


class FaceBlur(FrameProcessor):
    """Boxes are cut at the border of the frame; a frame without a face stays as it is, bit by bit."""

    def __init__(self, detect: Detector, strength: int = 51, sigma: float = 40.0) -> None:
        self.detect, self.kernel, self.sigma = detect, strength | 1, sigma

    def picture(self, frame: np.ndarray) -> np.ndarray:
        import cv2
        import numpy as np

        boxes = [box for box in self.detect(frame) if box[2] > 0 and box[3] > 0]
        if not boxes:
            return frame
        blurred = cv2.GaussianBlur(frame, (self.kernel, self.kernel), self.sigma)
        share = face_mask(frame.shape[:2], boxes)[..., None]  # [H, W, 1]
        mixed = frame.astype(np.float32) * (1 - share) + blurred.astype(np.float32) * share
        return (mixed + 0.5).astype(np.uint8)


def face_mask(shape: tuple[int, int], boxes: Sequence[Box]) -> np.ndarray:
    """[H, W] float32: 1 in the boxes, and from their border on, over MARGIN of their size, down to 0."""
    import numpy as np

    rows, columns = np.arange(shape[0], dtype=np.float32)[:, None], np.arange(shape[1], dtype=np.float32)[None]
    mask = np.zeros(shape, np.float32)
    for left, top, width, height in boxes:
        beyond = np.maximum(
            np.abs(columns + 0.5 - (left + width / 2)) / width, np.abs(rows + 0.5 - (top + height / 2)) / height
        ) - 0.5  # [H, W] in sizes of the box, 0 at its border
        mask = np.maximum(mask, np.clip(1 - beyond / MARGIN, 0, 1))
    return mask


def load_detector(path: str, score: float) -> Detector:
    """CheckpointError for a file that OpenCV does not take."""
    import cv2

    with foreign_errors(CheckpointError, f"{path} is no YuNet detector that OpenCV reads"):
        yunet = cv2.FaceDetectorYN.create(path, "", (320, 320), score)

    def detect(frame: np.ndarray) -> list[Box]:
        yunet.setInputSize((frame.shape[1], frame.shape[0]))
        found = yunet.detect(frame[..., ::-1].copy())[1]  # BGR
        return [] if found is None else [tuple(float(value) for value in face[:4]) for face in found]

    return detect


def load(config: Config) -> FaceBlur:
    options = config[FaceBlurOptions]
    return FaceBlur(load_detector(options.model or "", options.conf), options.strength, options.sigmax)


TOOL = FrameTool("Blur the faces of pictures and videos", FaceBlurOptions, "blur", problems_of, load)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(TOOL.run, argv)
