"""Edges of images by the Canny filter: one image, or every image of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from library.core.options import Config, option
from library.scripts.folder_tool import FolderTool, Tally, WriteOptions, images_of, read_ahead
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class EdgeOptions:
    """Edges"""

    input: str | None = option(None, help="an image, or a folder of images")
    output: str | None = option(
        None, help="the image to write; a folder, with PNG files of the same names, where --input is one"
    )
    thres1: int = option(32, help="lower threshold: weaker edges are dropped")
    thres2: int = option(224, help="upper threshold: stronger edges are kept, those between where they touch one")


CLASSES = (EdgeOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool("Draw the edges of an image, or of every image of a folder, by the Canny filter", CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def problems_of(config: Config) -> Iterator[str]:
    options = config[EdgeOptions]
    for name in ("input", "output"):
        if not getattr(options, name):
            yield f"--{name} is missing; name an image or a folder"
    if options.input and not os.path.exists(options.input):
        yield f"--input is {options.input}, which does not exist"
    if options.thres1 < 0 or options.thres2 < options.thres1:
        yield f"--thres1 is {options.thres1} and --thres2 is {options.thres2}; needed: 0 <= thres1 <= thres2"
    if options.input and options.output and os.path.isfile(options.input):
        yield from _output_problems(options, config[WriteOptions].overwrite)
    elif options.output and os.path.isfile(options.output):
        yield f"--output is {options.output}, which is a file; --input is a folder, and so must be --output"


def _output_problems(options: EdgeOptions, overwrite: bool) -> Iterator[str]:
    if os.path.splitext(options.output)[1].lower() not in ENDINGS:
        yield f"--output is {options.output}; needed: a name that ends in {', '.join(ENDINGS)}"
    elif os.path.realpath(options.output) == os.path.realpath(options.input):
        yield f"--output is {options.output}, which is the input; give it another name"
    elif os.path.exists(options.output) and not overwrite:
        yield f"--output is {options.output}, which exists; give another name or add --overwrite"


def run(argv: Sequence[str] | None = None) -> None:
    config = TOOL.read(argv, problems_of)
    options, tally = config[EdgeOptions], Tally()
    if os.path.isfile(options.input):
        from library.dataset.image_files import edges, read_on_white, write_image

        write_image(options.output, edges(read_on_white(options.input), options.thres1, options.thres2))
        tally.done = 1
    else:
        draw_folder(config, tally)
    tally.finish("edges")


def draw_folder(config: Config, tally: Tally) -> None:
    from library.dataset.image_files import edges, read_on_white, write_image

    options, wanted, taken = config[EdgeOptions], {}, set()
    for path in images_of(options.input):
        target = os.path.join(options.output, os.path.splitext(os.path.basename(path))[0] + ".png")
        if os.path.exists(target) and not config[WriteOptions].overwrite:
            tally.skip("whose output exists; --overwrite makes it anew")
        elif target in taken:
            tally.fail(f"{path} shares its name with another image, and so would their edges")
        else:
            wanted[path] = target
            taken.add(target)
    for path, image in read_ahead(read_on_white, list(wanted), tally, what="edges"):
        write_image(wanted[path], edges(image, options.thres1, options.thres2))
        tally.done += 1
