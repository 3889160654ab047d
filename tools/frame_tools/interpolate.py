"""Videos with more frames a second: what lies between two frames is moved along the motion that FFmpeg's minterpolate
finds, through PyAV."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from library.core.errors import AtelierError, foreign_errors
from library.core.options import Config, ignored_option, option
from library.scripts.tool_script import tool_exit_code
from tools.frame_tools.processing import FrameProcessor, FrameTool, no_picture

if TYPE_CHECKING:
    import numpy as np

FILTER = "minterpolate"
LARGEST_FACTOR = 8
WAITING = 4
"""copies of the last frame behind it: so many the filter wants to see before it gives the last ones"""
_NO_MODEL = "the motion is found without a model"


@dataclass(frozen=True, kw_only=True)
class InterpolationOptions:
    """Frames between frames"""

    factor: int = option(2, help="frames a second of the result / those of the video", least=2, most=LARGEST_FACTOR)
    model: str | None = ignored_option(None, help="folder of a model", reason=_NO_MODEL)
    mode: str | None = ignored_option(None, help="kind of the model", reason=_NO_MODEL)
    ds_factor: float = ignored_option(1.0, help="size at which a model looks for motion", reason=_NO_MODEL)


def filter_problem() -> str | None:
    """Why nothing can be interpolated here, or None."""
    from library.dataset.clips.video_files import has_pyav

    if not has_pyav():
        return "frames are interpolated by PyAV, which is not installed: pip install av"
    import av.filter

    return None if FILTER in av.filter.filters_available else f"this build of PyAV has no filter {FILTER}"


def problems_of(config: Config) -> Iterator[str]:
    problem = filter_problem()
    if problem:
        yield problem


class Interpolation(FrameProcessor):
    """Of F frames (F - 1) * factor + 1; those of the video stay as they are, bit by bit."""

    videos_only = True

    def __init__(self, factor: int) -> None:
        self.rate = factor

    def picture(self, frame: np.ndarray) -> np.ndarray:
        raise no_picture("interpolation")

    def frames(self, frames: Iterator[np.ndarray], fps: float) -> Iterator[np.ndarray]:
        first = next(frames, None)
        if first is None:
            return
        own: list[np.ndarray] = []  # frames of the video whose turn has not come
        count = 0

        def noted() -> Iterator[np.ndarray]:
            nonlocal count
            for frame in itertools.chain([first], frames):
                own.append(frame)
                count += 1
                yield frame
            yield from itertools.repeat(own[-1] if own else first, WAITING)

        place = 0
        for made in moved(noted(), self.rate, first.shape[:2]):
            number, between = divmod(place, self.rate)
            if number > 0 and not between:
                own.pop(0)
            yield made if between else own[0]
            place += 1
            if len(own) == 1 and not between and number == count - 1:  # the last frame of the video
                return
        if place < (count - 1) * self.rate + 1:
            raise AtelierError(f"the filter {FILTER} gave {place} frames of {(count - 1) * self.rate + 1}")


def moved(frames: Iterator[np.ndarray], factor: int, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """What the filter makes of frames [H, W, 3] at `factor` times their rate, a little behind them."""
    import av
    import av.filter

    base = Fraction(1, 1)
    with foreign_errors(AtelierError, f"the filter {FILTER}"):
        graph = av.filter.Graph()
        source = graph.add_buffer(width=shape[1], height=shape[0], format="yuv444p", time_base=base)
        motion = graph.add(FILTER, f"fps={factor}:mi_mode=mci:mc_mode=aobmc:vsbmc=1:scd=none")
        sink = graph.add("buffersink")
        source.link_to(motion)
        motion.link_to(sink)
        graph.configure()

    def ready() -> Iterator[Any]:
        while True:
            try:
                yield graph.pull().to_ndarray(format="rgb24")
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    for number, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv444p")
        frame.pts, frame.time_base = number, base
        graph.push(frame)
        yield from ready()
    graph.push(None)
    yield from ready()


TOOL = FrameTool(
    "Put frames between those of videos", InterpolationOptions, "vfi", problems_of,
    lambda config: Interpolation(config[InterpolationOptions].factor), videos_only=True,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(TOOL.run, argv)
