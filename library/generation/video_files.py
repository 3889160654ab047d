"""Clips as video files, or as one picture for each frame: written through PyAV where it is installed, else through
OpenCV.

The same frames, rate and size give the same bytes. A file is complete or not there.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from library.core.atomic_file import atomic_path
from library.core.errors import AtelierError, ConfigError, foreign_errors
from library.core.write_errors import write_errors_of
from library.dataset.clips.video_files import has_pyav, reader_of
from library.generation.image_grid import GridCell, image_grid
from library.generation.picture_files import DEFAULT_QUALITY, comment_texts, write_picture
from library.generation.video_requests import CODEC_ENDINGS

if TYPE_CHECKING:
    import numpy
    from PIL import Image

BITS_PER_SECOND = 4_000_000
LARGEST_FPS = 1000
CONTACT_CELLS = 9
"""frames on a contact sheet"""
_STEADY = {"libx264": {"x264-params": "mbtree=0"}}
"""settings by which an encoder gives equal bytes: libx264's macroblock tree reads on behind the blocks of a row, so
that two runs differ now and then"""
_SIDE_STEP = 2  # colours are stored at half the size

_PYAV_CODECS: Mapping[str, tuple[str, ...]] = {
    ".mp4": ("libx264", "libopenh264", "mpeg4"),
    ".mov": ("libx264", "libopenh264", "mpeg4"),
    ".mkv": ("libx264", "libopenh264", "mpeg4"),
    ".avi": ("libx264", "mpeg4", "mjpeg"),
    ".webm": ("libvpx-vp9", "libvpx"),
}
"""ending -> encoders of PyAV, the first that works is taken"""
_OPENCV_CODECS: Mapping[str, tuple[str, ...]] = {
    ".mp4": ("avc1", "mp4v"),
    ".mov": ("avc1", "mp4v"),
    ".avi": ("mp4v", "MJPG"),
}
"""the same of OpenCV, four letters each. Its .mkv and .webm have a drawn number in them: no two files are equal"""
VIDEO_ENDINGS = tuple(_PYAV_CODECS)
COMMENT = "comment"
"""entry of a video file that holds texts, as JSON: all kinds of files have it"""


_OF_FORMAT = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})
"""entries about the file, not what it shows"""


@dataclass(frozen=True)
class Coding:
    """What a name of --codec asks of an encoder: nearly without loss, at the pace of a file that is kept."""

    encoder: str
    pixels: str
    settings: Mapping[str, str] = field(default_factory=dict)


_SLOW = {"preset": "slow", "crf": "12"}
CODINGS: Mapping[str, Coding] = {
    "h264": Coding("libx264", "yuv420p", _SLOW),
    # Without frames that wait for later ones: builds of the encoder fail now and then where a short clip ends with such
    "h265": Coding("libx265", "yuv420p", {**_SLOW, "tune": "zerolatency", "x265-params": "log-level=none:pools=none"}),
    "prores": Coding("prores_ks", "yuv422p10le", {"profile": "3"}),
}
H264_CODECS = frozenset({"libx264", "libopenh264", "avc1"})


@dataclass(frozen=True)
class Encoder:
    """What writes video files of one ending. `tried`: those before it that this machine does not have."""

    package: str
    codec: str
    tried: tuple[str, ...] = ()
    coding: Coding | None = None

    @property
    def notice(self) -> str | None:
        """A line for the log where the file is not what players like best."""
        if self.coding or self.codec in H264_CODECS or self.codec.startswith("libvpx-vp9"):
            return None
        missing = f" (not there: {', '.join(self.tried)})" if self.tried else ""
        return (
            f"videos are written as {self.codec} by {self.package}{missing}, which web browsers do not play;"
            " H.264 comes with PyAV: pip install av"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def ending_problem(ending: str, codec: str | None = None) -> str | None:
    """Why files of this ending, with a codec of CODINGS, cannot be written here, or None."""
    if ending.lower() not in VIDEO_ENDINGS:
        return f"video files end in {', '.join(VIDEO_ENDINGS)}, not in '{ending}'"
    try:
        encoder_of(ending, codec)
    except ConfigError as error:
        return str(error)
    return None


@functools.cache
def encoder_of(ending: str, codec: str | None = None) -> Encoder:
    """The first encoder that writes two frames into a file of this ending; of a codec of CODINGS the one that it names.
    ConfigError that names those tried."""
    ending, tried = ending.lower(), []
    if codec is not None:
        return _asked_encoder(ending, codec)
    ways = [("PyAV", codec, _write_pyav) for codec in _PYAV_CODECS.get(ending, ()) if has_pyav()]
    ways += [("OpenCV", codec, _write_opencv) for codec in _OPENCV_CODECS.get(ending, ())]
    for package, codec, write in ways:
        if _works(write, codec, ending):
            return Encoder(package, codec, tuple(tried))
        tried.append(f"{codec} of {package}")
    known = f"tried: {', '.join(tried)}" if tried else "OpenCV writes none that are equal for equal frames"
    raise ConfigError(f"no encoder for {ending} files ({known}); PyAV brings one: pip install av, or choose .mp4")


def _asked_encoder(ending: str, codec: str) -> Encoder:
    coding = CODINGS[codec]
    if ending not in CODEC_ENDINGS[codec]:
        raise ConfigError(f"{codec} is written into files that end in {', '.join(CODEC_ENDINGS[codec])}, not {ending}")
    if not has_pyav():
        raise ConfigError(f"{codec} is written by PyAV, which is not installed: pip install av")
    if not _works(_write_pyav, coding.encoder, ending, coding=coding):
        raise ConfigError(f"PyAV has no {coding.encoder} here, which writes {codec}; choose another codec")
    return Encoder("PyAV", coding.encoder, coding=coding)


def write_video(
    frames: Sequence[Image.Image], path: Path, fps: float, codec: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """A video file of RGB frames of one size, shown at `fps` frames per second. Both sides must be even. `codec`: one
    of CODINGS. `texts` are kept as JSON in the comment of the file, where PyAV writes it.

    ConfigError without an encoder for the ending, for a rate or a size that no file has; AtelierError when the encoder
    fails.
    """
    import numpy

    pixels = [numpy.ascontiguousarray(numpy.asarray(frame.convert("RGB"))) for frame in frames]  # F of [H, W, 3]
    problems = shape_problems(pixels, fps)
    if problems:
        raise ConfigError([f"{path.name}: {problem}" for problem in problems])
    return write_pixels(pixels, path, fps, codec, texts)


def write_pixels(
    frames: Iterable[numpy.ndarray], path: Path, fps: float, codec: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """As `write_video`, of frames [H, W, 3] uint8 that are written as they come, so that few are in memory.
    AtelierError too where a later frame has another size."""
    numbered = iter(frames)
    first = next(numbered, None)
    problems = shape_problems([] if first is None else [first], fps)
    if problems:
        raise ConfigError([f"{path.name}: {problem}" for problem in problems])
    encoder = encoder_of(path.suffix, codec)
    write = _write_pyav if encoder.package == "PyAV" else _write_opencv
    more: dict[str, Any] = {"coding": encoder.coding} if encoder.coding else {}
    if texts and encoder.package == "PyAV":
        more["texts"] = texts
    pixels = _of_one_size(itertools.chain([first], numbered))
    with atomic_path(path) as temporary:
        with_ending = temporary.with_name(temporary.name + path.suffix)  # encoders go by the ending
        told = f"{path}: {encoder.codec} of {encoder.package} cannot write it"
        try:
            with foreign_errors(AtelierError, told), write_errors_of(path), quiet_stderr():
                write(pixels, with_ending, fps, encoder.codec, **more)
            os.replace(with_ending, temporary)
        finally:
            with suppress(OSError):
                with_ending.unlink(missing_ok=True)
    return path


def _of_one_size(frames: Iterable[numpy.ndarray]) -> Iterator[numpy.ndarray]:
    shape = None
    for frame in frames:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise AtelierError(f"frames have sides {frame.shape[:2]} and {shape[:2]}; needed: one size")
        yield frame


def shape_problems(frames: Sequence[numpy.ndarray], fps: float) -> list[str]:
    """What is wrong with frames [H, W, 3] and their rate."""
    if not frames:
        return ["there are no frames"]
    sizes = {(frame.shape[1], frame.shape[0]) for frame in frames}
    found = [] if len(sizes) == 1 else [f"the frames have {len(sizes)} sizes; needed: one"]
    width, height = next(iter(sizes))
    if width % _SIDE_STEP or height % _SIDE_STEP:
        found.append(f"the size is {width}x{height}; video files have even sides")
    if not (math.isfinite(fps) and 0 < fps <= LARGEST_FPS):
        found.append(f"the rate is {fps:g} frames per second; needed: above 0, at most {LARGEST_FPS}")
    return found


def write_frames(
    frames: Sequence[Image.Image], folder: Path, texts: Mapping[str, str] | None = None, ending: str = ".png",
    quality: int = DEFAULT_QUALITY,
) -> Path:
    """One picture for each frame in a folder of their own: `{folder}/{its name}_{number:03d}.png`."""
    for number, frame in enumerate(frames):
        write_picture(frame, folder / f"{folder.name}_{number:03d}{ending}", texts, quality)
    return folder


def contact_sheet(frames: Sequence[Image.Image], fps: float) -> Image.Image:
    """A picture of up to CONTACT_CELLS frames, evenly spread from the first to the last, with their times."""
    last, cells = len(frames) - 1, min(len(frames), CONTACT_CELLS)
    numbers = [round(place * last / (cells - 1)) for place in range(cells)] if cells > 1 else [0]
    shown = [GridCell(frames[number], f"{number}: {number / fps:.2f} s") for number in numbers]
    return image_grid(shown, min_cell_px=1)


def _works(write: Any, codec: str, ending: str, **more: Any) -> bool:
    import numpy

    with tempfile.TemporaryDirectory() as folder, quiet_stderr():
        target = Path(folder) / f"probe{ending}"
        try:
            write([numpy.full((32, 48, 3), level, numpy.uint8) for level in (40, 200)], target, 24.0, codec, **more)
        except Exception:  # each encoder has its own ways to say that it is not there
            return False
        return target.is_file() and target.stat().st_size > 0


def _write_pyav(
    frames: Iterable[numpy.ndarray], path: Path, fps: float, codec: str, coding: Coding | None = None,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """One thread and no date, version or drawn number in the file: equal bytes on every machine."""
    import av

    rate = Fraction(fps).limit_denominator(1001 * 1000)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        if texts:
            container.metadata[COMMENT] = json.dumps(dict(texts), ensure_ascii=False, sort_keys=True)
        numbered = iter(frames)
        first = next(numbered)
        settings = {**(coding.settings if coding else {}), **_STEADY.get(codec, {})}
        stream = container.add_stream(codec, rate=rate, options=settings)
        stream.height, stream.width = first.shape[:2]
        if coding:
            stream.pix_fmt = coding.pixels
            _tell_colours(stream.codec_context)
        else:
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.bit_rate = BITS_PER_SECOND
        stream.thread_count = 1
        stream.codec_context.time_base = 1 / rate
        given = (av.VideoFrame.from_ndarray(pixels, format="rgb24") for pixels in itertools.chain([first], numbered))
        for frame in _converted(given, coding.pixels, first.shape, 1 / rate) if coding else given:
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _converted(frames: Iterable[Any], pixels: str, shape: Sequence[int], time_base: Fraction) -> Iterator[Any]:
    """Frames in another form of pixels, of BT.709 from black at 16 to white at 235.

    By filters, whose frames have room behind their rows: without it the conversion, and encoders that work in the
    frame itself, read on behind them, and two runs differ.
    """
    import av.filter

    graph = av.filter.Graph()
    chain = [
        graph.add_buffer(width=shape[1], height=shape[0], format="rgb24", time_base=time_base),
        graph.add("scale", "out_color_matrix=bt709:out_range=limited:flags=bicubic+accurate_rnd+bitexact"),
        graph.add("format", pixels), graph.add("buffersink"),
    ]  # fmt: skip
    for before, after in itertools.pairwise(chain):
        before.link_to(after)
    graph.configure()
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base = number, time_base
        graph.push(frame)
        made = graph.pull()
        made.pts, made.time_base = number, time_base
        yield made


def _tell_colours(context: Any) -> None:
    """BT.709 (1 in all of them), from black at 16 to white at 235."""
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1


def _write_opencv(frames: Iterable[numpy.ndarray], path: Path, fps: float, codec: str) -> None:
    import cv2

    numbered, written = iter(frames), 0
    first = next(numbered)
    height, width = first.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    if not writer.isOpened():
        raise RuntimeError("it cannot be opened for writing")
    try:
        for pixels in itertools.chain([first], numbered):
            writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
            written += 1
    finally:
        writer.release()
    capture = cv2.VideoCapture(str(path))  # a full disk is no error for OpenCV
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    if count != written:
        raise RuntimeError(f"the file holds {count} of {written} frames; is the disk full?")


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Inside, what encoders print past Python is thrown away: what matters of it is in our own messages."""
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@dataclass(frozen=True)
class ClipFile:
    """A video file and the contact sheet beside it."""

    video: Path
    sheet: Path


def write_clip(frames: Sequence[Image.Image], path: Path, fps: float, texts: Mapping[str, str]) -> ClipFile:
    """A video file, and beside it a contact sheet (`.png`), which tells how it was made."""
    video = write_video(frames, path, fps)
    return ClipFile(video, write_picture(contact_sheet(frames, fps), path.with_suffix(".png"), texts))


# -- reading -----------------------------------------------------------------------------------------------------------


def read_video(path: str | os.PathLike[str], most: int | None = None) -> list[Image.Image]:
    """The first `most` frames of a video file, or of a folder of pictures, as RGB and as they are shown. ConfigError
    when there are none."""
    from PIL import Image

    with quiet_stderr():
        frames = [
            Image.fromarray(read())
            for read in itertools.islice(reader_of(str(path)).each_frame(str(path), with_alpha=False), most)
        ]
    if not frames:
        raise ConfigError(f"{path} has no frames that can be read; needed: a file with a video stream")
    return frames


def read_video_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of `write_video` in the comment of a file, and other entries of the file by their names in small
    letters. ConfigError without PyAV; AtelierError for a file that cannot be read."""
    if not has_pyav():
        raise ConfigError(f"{path}: what a video file tells is read by PyAV, which is not installed: pip install av")
    import av

    with quiet_stderr(), foreign_errors(AtelierError, f"{path} cannot be read as a video"), av.open(str(path)) as file:
        entries = {name.lower(): text for name, text in file.metadata.items()}
    comment = entries.pop(COMMENT, "")
    return {**{name: text for name, text in entries.items() if name not in _OF_FORMAT}, **comment_texts(comment)}
