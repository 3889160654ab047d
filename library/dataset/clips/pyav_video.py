"""Videos read by PyAV (extra `video`): frames are counted without decoding them, and transparency is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from library.dataset.clips.video_check import VideoCheck, check_is_file, no_frames, number_at, timed_check
from library.dataset.media_utils import ImageFileError

if TYPE_CHECKING:
    import av

MOST_BROKEN = 5
"""packets at the end of a file that are tried one by one"""


def look(path: str) -> VideoCheck:
    """Size, frames and times from the packets of the file; only the first and the last frames are decoded. Raises
    ImageFileError."""
    with _opened(path) as (container, stream):
        first = next(_decoded(container, stream), None)
        if first is None:
            raise no_frames(path)
        size = _pixels(first, with_alpha=False).shape[1::-1]
        transparent = any(part.is_alpha for part in first.format.components)
    with _opened(path) as (container, stream):
        times = _readable(container, stream, _times(container, stream))
        if not times:
            raise no_frames(path)
        promised, rate = stream.frames, stream.average_rate
    return timed_check(size, times, rate, promised, transparent)


def each_frame(path: str, with_alpha: bool) -> Iterator[Callable[[], np.ndarray]]:
    """For every frame, what gives its pixels [H, W, 3 or 4] as shown; frames that nobody asks for are not converted."""
    with _opened(path) as (container, stream):
        for frame in _decoded(container, stream):
            yield functools.partial(_pixels, frame, with_alpha)


def frames_near(
    path: str, first: int, rate: Fraction, with_alpha: bool
) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Frames with their numbers, from the key frame before `first` on, of a file with even times; nothing where the
    file does not say when it begins."""
    with _opened(path) as (container, stream):
        begin, tick = stream.start_time, stream.time_base
        if begin is None or tick is None:
            return
        container.seek(begin + int(first / rate / tick), stream=stream)
        for frame in _decoded(container, stream):
            number = None if frame.pts is None else number_at(float((frame.pts - begin) * tick * rate))
            if number is None:
                return
            yield number, functools.partial(_pixels, frame, with_alpha)


@contextmanager
def _opened(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    check_is_file(path)
    import av

    try:
        container = av.open(path)
    except (av.FFmpegError, OSError) as error:
        raise ImageFileError(f"{path} is no video that can be read: {error.strerror or error}") from error
    with container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            others = ", ".join(dict.fromkeys(stream.type for stream in container.streams)) or "nothing"
            raise ImageFileError(f"{path} has no video stream (it holds {others})")
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def _is_cover(stream: av.VideoStream) -> bool:
    """Whether a stream is the still picture of a piece of music."""
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames in the order in which they are shown, up to where the file breaks off."""
    import av

    frames = container.decode(stream)
    while True:
        try:
            yield next(frames)
        except (StopIteration, av.FFmpegError):
            return


def _times(container: av.container.InputContainer, stream: av.VideoStream) -> list[Fraction]:
    """When the frames of the packets begin [s], in order."""
    import av

    found = []
    try:
        for packet in container.demux(stream):
            begin = packet.dts if packet.pts is None else packet.pts
            if begin is not None and packet.size and not packet.is_discard:
                found.append(begin * packet.time_base)
    except av.FFmpegError:
        pass
    return sorted(found)


def _readable(
    container: av.container.InputContainer, stream: av.VideoStream, times: list[Fraction]
) -> list[Fraction]:
    """Without those at the end of which the decoder makes no frame: packets that broke off, or hold none."""
    import av

    for _ in range(MOST_BROKEN):
        if not times:
            break
        try:
            container.seek(int(times[-1] / stream.time_base), stream=stream)
        except av.FFmpegError:  # of streams in which there is no place to go to
            break
        begins = [frame.dts if frame.pts is None else frame.pts for frame in _decoded(container, stream)]
        if begins:
            last = max((begin * stream.time_base for begin in begins if begin is not None), default=times[-1])
            return [time for time in times if time <= last]
        times = times[:-1]  # where it stands alone, as in codecs of single pictures
    return times


def _pixels(frame: av.VideoFrame, with_alpha: bool) -> np.ndarray:
    """[H, W, 3 or 4] uint8, turned as the file's rotation tag says."""
    pixels = frame.to_ndarray(format="rgba" if with_alpha else "rgb24")
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90 % 4))
