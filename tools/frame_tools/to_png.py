"""The frames of videos as pictures, one folder for each."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.errors import AtelierError
from library.core.options import Config, option
from library.scripts.folder_tool import FolderTool, Tally, WriteOptions, files_of
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions
from tools.frame_tools.processing import frame_bar, is_video


@dataclass(frozen=True, kw_only=True)
class VideoToPngOptions:
    """Frames"""

    input: str | None = option(None, help="video, or folder of videos")
    output: str | None = option(
        None, help="folder of the frames; of several videos each has one of its name in it. Beside the video under its"
        " name when not given",
    )  # fmt: skip
    num_frames: int | None = option(None, help="first frames that are written; all when not given", least=1)


CLASSES = (VideoToPngOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool("Write the frames of videos as PNG files", CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def found_videos(options: VideoToPngOptions) -> list[str]:
    if not options.input or not os.path.exists(options.input):
        return []
    paths = files_of(options.input) if os.path.isdir(options.input) else [options.input]
    return [path for path in paths if is_video(path)]


def problems_of(config: Config) -> Iterator[str]:
    options = config[VideoToPngOptions]
    if not options.input:
        yield "--input is missing; name a video or a folder of videos"
    elif not os.path.exists(options.input):
        yield f"--input is {options.input}, which does not exist"
    elif not found_videos(options):
        yield f"--input is {options.input}, which is no video and has none in it"
    if options.output and os.path.isfile(options.output):
        yield f"--output is {options.output}, which is a file; name a folder"


def run(argv: Sequence[str] | None = None) -> list[Path]:
    """The folders that were written."""
    config, tally, made = TOOL.read(argv, problems_of), Tally(), []
    options = config[VideoToPngOptions]
    with frame_bar() as bar:
        for path in found_videos(options):
            folder = folder_of(path, options)
            if folder.is_dir() and any(folder.iterdir()) and not config[WriteOptions].overwrite:
                tally.skip("whose folder has files; --overwrite writes into it")
                continue
            try:
                write_all(path, folder, options.num_frames, bar)
            except AtelierError as error:
                tally.fail(error)
            else:
                tally.done += 1
                made.append(folder)
    tally.finish("videos")
    return made


def folder_of(path: str, options: VideoToPngOptions) -> Path:
    source = Path(path)
    if options.output is None:
        return source.with_suffix("")
    return Path(options.output) / source.stem if os.path.isdir(options.input or "") else Path(options.output)


def write_all(path: str, folder: Path, most: int | None, bar: Any) -> None:
    """`{number:06d}.png` from 0 on. ImageFileError for a video that cannot be read."""
    from library.dataset.clips.video_files import look_at_video, reader_of
    from library.dataset.image_files import write_image

    count = look_at_video(path).frames
    bar.total += count if most is None else min(count, most)
    folder.mkdir(parents=True, exist_ok=True)
    for number, read in enumerate(itertools.islice(reader_of(path).each_frame(path, False), most)):
        write_image(folder / f"{number:06d}.png", read()[..., :3])
        bar.update()
