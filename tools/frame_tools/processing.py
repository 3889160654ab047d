"""What the tools for frames share: pictures and videos read, put through a `FrameProcessor` and written, with progress.

A processor takes frames and gives frames, [H, W, 3] RGB uint8; files, names, codecs and counting are none of its
business.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.core.errors import AtelierError, ConfigError
from library.core.options import Config, equivalent_option, ignored_option, option
from library.generation.video_requests import CODEC_ENDINGS
from library.scripts.folder_tool import FolderTool, Tally, WriteOptions, files_of
from library.training.option_groups import ConsoleOptions

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("atelier")

CONTAINERS = ("mp4", "mov", "mkv", "avi", "webm")
WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""endings of pictures whose results keep them; others become PNG"""
DEFAULT_RATE = 24.0
"""frames per second of a video that tells none"""


class FrameProcessor(ABC):
    """What a tool does with frames. One that looks at each alone fills `picture`; one that looks at neighbours, or
    gives more frames than it takes, `frames`."""

    rate: int = 1
    """frames that are given per frame, and so the factor of a video's frames per second"""
    videos_only: ClassVar[bool] = False

    @abstractmethod
    def picture(self, frame: np.ndarray) -> np.ndarray:
        """[H, W, 3] -> [H', W', 3], both uint8 RGB."""

    def frames(self, frames: Iterator[np.ndarray], fps: float) -> Iterator[np.ndarray]:
        """Those of a video, in order; each as it is asked for."""
        return map(self.picture, frames)


@dataclass(frozen=True, kw_only=True)
class FrameToolOptions:
    """Files"""

    input: str | None = option(None, help="picture, video, or folder of both")
    output: str | None = option(
        None, help="file, or folder where files keep their names; beside the input under the tool's own name when not"
        " given",
    )  # fmt: skip
    recursive: bool = option(False, help="files in the folders of --input too")
    container: str | None = option(
        None, choices=CONTAINERS, help="kind of video files; that of --output, or else mp4, when not given. mkv and webm"
        " need PyAV",
    )  # fmt: skip
    codec: str | None = option(
        None, choices=tuple(CODEC_ENDINGS),
        help="codec of videos, as that of video scripts; H.264 of 4 Mbit/s, or what the machine has, when not given",
    )  # fmt: skip
    keep_pngs: bool = option(False, help="write the frames of videos as pictures too, in a folder of the video's name")
    yes: bool = equivalent_option(
        False, help="ask nothing", flags=("-y",), reason="--yes: nothing is asked; --overwrite writes over results"
    )
    seed: int | None = ignored_option(None, help="seed", reason="nothing is drawn at random")

    @property
    def video_ending(self) -> str:
        known, named = CODEC_ENDINGS.get(self.codec or "", ()), self.output_ending[1:]
        container = self.container or (named if named in CONTAINERS else "mp4")
        return known[0] if known and container == "mp4" and ".mp4" not in known else f".{container}"

    @property
    def output_ending(self) -> str:
        """Of --output where it is a file, in small letters; '' of a folder."""
        if self.output is None or os.path.isdir(self.output) or os.path.isdir(self.input or ""):
            return ""
        return os.path.splitext(self.output)[1].lower()


@dataclass(frozen=True)
class FrameTool:
    """A tool: its options, what is wrong with them, and the processor that they ask for. `suffix`: of results beside
    their input, `<stem>_<suffix>`."""

    description: str
    options: type
    suffix: str
    problems: Callable[[Config], Iterator[str]]
    load: Callable[[Config], FrameProcessor]
    videos_only: bool = False

    @property
    def folder_tool(self) -> FolderTool:
        return FolderTool(self.description, (self.options, FrameToolOptions, WriteOptions, ConsoleOptions))

    def run(
        self, argv: Sequence[str] | None = None, make: Callable[[], FrameProcessor] | None = None
    ) -> list[Path]:
        """Read the options, check all files, load the processor and go through the files; the results. ConfigError,
        and AtelierError when nothing could be done. `make` gives the processor in the place of `load`."""
        from library.scripts.command_line import tell_ignored

        plan: list[tuple[str, Path]] = []

        def check(config: Config) -> Iterator[str]:
            yield from self.problems(config) if make is None else ()
            yield from file_problems(config, self, plan)

        config, tally = self.folder_tool.read(argv, check), Tally()
        tell_ignored(config)
        wanted = [(source, target) for source, target in plan if not _is_there(target, config, tally)]
        made = process_files(wanted, config, (make or (lambda: self.load(config)))(), tally) if wanted else []
        tally.finish("files")
        return made


# -- files -------------------------------------------------------------------------------------------------------------


def is_video(path: str) -> bool:
    from library.dataset.clips.video_files import VIDEO_EXTENSIONS

    return os.path.splitext(path)[1].lower() in VIDEO_EXTENSIONS


def file_problems(config: Config, tool: FrameTool, plan: list[tuple[str, Path]]) -> Iterator[str]:
    """What is wrong with input and output; otherwise `plan` gets (file, its result)."""
    from library.generation.video_files import ending_problem

    options = config[FrameToolOptions]
    sources = found_files(options, tool)
    if not options.input:
        yield "--input is missing; name a picture, a video or a folder"
    elif not os.path.exists(options.input):
        yield f"--input is {options.input}, which does not exist"
    elif not sources:
        yield f"--input is {options.input}, which has no {'video' if tool.videos_only else 'picture or video'} in it"
    elif os.path.isdir(options.input) and options.output and os.path.isfile(options.output):
        yield f"--output is {options.output}, a file, and --input a folder; name a folder"
    elif problem := _ending_problem(options, sources[0]):
        yield problem
    else:
        plan += [(path, target_of(path, options, tool.suffix)) for path in sources]
        yield from _target_problems(plan)
    if any(map(is_video, sources)):
        problem = ending_problem(options.video_ending, options.codec)
        if problem:
            ending = options.video_ending[1:]
            yield f"--codec is {options.codec}: {problem}" if options.codec else f"--container is {ending}: {problem}"


def _ending_problem(options: FrameToolOptions, source: str) -> str | None:
    """Why the result of a single file cannot be the file that --output names."""
    ending = options.output_ending
    if not ending:
        return None
    if not is_video(source):
        known = ", ".join(WRITABLE)
        return None if ending in WRITABLE else f"--output is {options.output}; needed for a picture: {known}, or a folder"
    if ending[1:] not in CONTAINERS:
        return f"--output is {options.output}; needed for a video: .{', .'.join(CONTAINERS)}, or a folder"
    if options.container is not None and ending != f".{options.container}":
        return f"--output is {options.output}, and --container {options.container}; leave one out, or let them agree"
    return None


def _target_problems(plan: Sequence[tuple[str, Path]]) -> Iterator[str]:
    owners: dict[Path, str] = {}
    for path, target in plan:
        other = owners.setdefault(target, path)
        if other != path:
            yield f"{other} and {path} would both become {target}; rename one"
        if os.path.abspath(target) == os.path.abspath(path):
            yield f"{path} would be written over itself; give another --output"


def found_files(options: FrameToolOptions, tool: FrameTool) -> list[str]:
    """Pictures and videos of --input, sorted; those of a folder without what an earlier run has made of them there."""
    from library.dataset.media_utils import image_extensions

    if not options.input or not os.path.exists(options.input):
        return []
    paths = files_of(options.input, options.recursive) if os.path.isdir(options.input) else [options.input]
    if options.recursive and options.output and _is_below(options.output, options.input):
        paths = [path for path in paths if not _is_below(path, options.output)]
    known = () if tool.videos_only else image_extensions()
    paths = [path for path in paths if is_video(path) or os.path.splitext(path)[1].lower() in known]
    if options.output is None and os.path.isdir(options.input):
        stems, mark = {os.path.splitext(path)[0] for path in paths}, f"_{tool.suffix}"
        return [path for path in paths if not _is_result(os.path.splitext(path)[0], mark, stems)]
    return paths


def _is_result(stem: str, mark: str, stems: Collection[str]) -> bool:
    return stem.endswith(mark) and stem.removesuffix(mark) in stems


def _is_below(path: str, folder: str) -> bool:
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents


def target_of(path: str, options: FrameToolOptions, suffix: str) -> Path:
    """The result of a file: in the folder --output under its own name, the file --output itself, or beside it."""
    source = Path(path)
    ending = options.video_ending if is_video(path) else source.suffix
    ending = ending if is_video(path) or ending.lower() in WRITABLE else ".png"
    if options.output is None:
        return source.with_name(f"{source.stem}_{suffix}{ending}")
    output = Path(options.output)
    if not options.output_ending:
        below = source.parent.relative_to(options.input) if os.path.isdir(options.input or "") else Path()
        return output / below / f"{source.stem}{ending}"
    return output.with_suffix(ending) if is_video(path) else output


def _is_there(target: Path, config: Config, tally: Tally) -> bool:
    if not target.exists() or config[WriteOptions].overwrite:
        return False
    tally.skip("whose result exists; --overwrite makes it anew")
    return True


# -- work --------------------------------------------------------------------------------------------------------------


def process_files(
    wanted: Sequence[tuple[str, Path]], config: Config, processor: FrameProcessor, tally: Tally
) -> list[Path]:
    """The results that could be made; files that cannot be read or made are told, counted and left out."""
    made = []
    with frame_bar(sum(not is_video(source) for source, _ in wanted)) as bar:
        for source, target in wanted:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if is_video(source):
                    process_video(source, target, config[FrameToolOptions], processor, bar)
                else:
                    process_picture(source, target, processor)
                    bar.update()
            except AtelierError as error:
                tally.fail(error)
            else:
                tally.done += 1
                made.append(target)
    return made


@contextmanager
def frame_bar(known: int = 0) -> Iterator[Any]:
    """A bar that counts frames, `known` of them and those of videos as these come. It writes past what encoders are
    kept from printing."""
    from tqdm import tqdm

    try:
        own = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace")
    except (OSError, ValueError, AttributeError):  # no console
        own = sys.stderr
    with tqdm(total=known, unit="frame", file=own) as bar:
        yield bar
    if own is not sys.stderr:
        own.close()


def process_picture(source: str, target: Path, processor: FrameProcessor) -> None:
    """Transparent parts are over white."""
    from library.dataset.image_files import read_on_white, write_image

    write_image(target, processor.picture(read_on_white(source)))


def process_video(
    source: str, target: Path, options: FrameToolOptions, processor: FrameProcessor, bar: Any
) -> None:
    """Frame by frame, so that few are in memory; sound is not kept."""
    from library.dataset.clips.video_files import look_at_video, reader_of
    from library.generation.video_files import write_pixels

    check = look_at_video(source)
    fps = float(check.rate or DEFAULT_RATE)
    bar.total += (check.frames - 1) * processor.rate + 1
    bar.set_description(Path(source).name)
    frames = (read()[..., :3] for read in reader_of(source).each_frame(source, False))
    results = map(even_sides, processor.frames(frames, fps))
    write_pixels(_counted(_kept(results, target, options.keep_pngs), bar), target, fps * processor.rate, options.codec)
    logger.info("%s: %d frames a second; sound is not kept", target, fps * processor.rate)


def _counted(frames: Iterator[np.ndarray], bar: Any) -> Iterator[np.ndarray]:
    for frame in frames:
        yield frame
        bar.update()


def _kept(frames: Iterator[np.ndarray], target: Path, keeps: bool) -> Iterator[np.ndarray]:
    """The frames, each written as a picture on its way where that is asked for."""
    from library.dataset.image_files import write_image

    for number in itertools.count():
        frame = next(frames, None)
        if frame is None:
            return
        if keeps:
            folder = target.with_suffix("")
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / f"{target.stem}_{number:03d}.png", frame)
        yield frame


def even_sides(frame: np.ndarray) -> np.ndarray:
    """[H, W, 3] with a row or column repeated where a side is odd, which videos do not have."""
    import numpy as np

    height, width = frame.shape[:2]
    padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(padded)


def missing_file(name: str, path: str | None, what: str) -> str | None:
    """A message where an option names no file, or one that is not there."""
    if not path:
        return f"--{name} is missing; name {what}"
    return None if os.path.isfile(path) else f"--{name} is {path}, which does not exist"


def no_picture(tool: str) -> ConfigError:
    return ConfigError(f"{tool} works between the frames of a video; a single picture has none")
