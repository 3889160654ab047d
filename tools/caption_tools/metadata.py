"""Captions and tags of files beside images, gathered in the metadata file of a dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.core.errors import ConfigError
from library.core.options import Config, option
from library.scripts.folder_tool import (
    DetailOptions,
    FolderTool,
    Tally,
    WriteOptions,
    folder_problem,
    images_of,
    logger,
    progress,
    read_text_file,
)
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions

ENDINGS = {"caption": ".caption", "tags": ".txt"}


@dataclass(frozen=True, kw_only=True)
class MergeMetadataOptions:
    """What is gathered"""

    train_data_dir: str | None = option(None, help="folder of the images, with a text file beside each")
    out_json: str | None = option(
        None, help="metadata file to write; what it holds already stays, unless --in_json names another"
    )
    in_json: str | None = option(None, help="metadata file to begin with; out_json when that exists")
    tags: bool = option(False, help="the files hold tags, not captions")
    caption_extension: str | None = option(
        None,
        flags=("--caption_extention",),
        help="ending of the text files; .caption, or .txt with --tags, when not given",
    )
    full_path: bool = option(False, help="name images by their full paths, not by their names without extension")
    recursive: bool = option(False, help="images in folders within the folder too; needs --full_path")

    @property
    def part(self) -> str:
        return "tags" if self.tags else "caption"

    @property
    def ending(self) -> str:
        return self.caption_extension or ENDINGS[self.part]


CLASSES = (MergeMetadataOptions, DetailOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool(
    "Gather the captions or tags beside images in a metadata file", CLASSES, ("train_data_dir", "out_json")
)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def problems_of(config: Config) -> Iterator[str]:
    options = config[MergeMetadataOptions]
    found = folder_problem("train_data_dir", options.train_data_dir)
    if found:
        yield found
    if options.recursive and not options.full_path:
        yield "--recursive needs --full_path: images of several folders may have one name"
    if options.in_json and not os.path.isfile(options.in_json):
        yield f"--in_json is {options.in_json}, which does not exist"
    same = options.in_json and os.path.realpath(options.in_json) == os.path.realpath(options.out_json)
    yield from output_json_problems(options.out_json, None if same else options.in_json, config)


def output_json_problems(out_json: str, in_json: str | None, config: Config) -> Iterator[str]:
    """A file that would be lost: it exists and is not the one that the work begins with."""
    if os.path.isdir(out_json):
        yield f"out_json is {out_json}, which is a folder; name a file"
    elif in_json and os.path.exists(out_json) and not config[WriteOptions].overwrite:
        yield f"out_json is {out_json}, which exists; give another name or add --overwrite"


def run(argv: Sequence[str] | None = None) -> None:
    config = TOOL.read(argv, problems_of)
    options, tally = config[MergeMetadataOptions], Tally()
    images = images_of(options.train_data_dir, options.recursive)
    source = options.in_json or (options.out_json if os.path.isfile(options.out_json) else None)
    metadata = read_metadata(source) if source else {}
    for path in progress(images, f"reading {options.part}"):
        text_path = os.path.splitext(path)[0] + (
            options.ending if options.ending.startswith(".") else f".{options.ending}"
        )
        if not os.path.isfile(text_path):
            tally.skip(f"without a {options.ending} file")
            continue
        try:
            text = read_text_file(text_path).strip()
        except ConfigError as error:
            tally.fail(error)
            continue
        metadata.setdefault(metadata_key(path, full_path=options.full_path), {})[options.part] = text
        tally.done += 1
        if config[DetailOptions].debug:
            logger.info("%s: %s", path, text)
    if tally.done:
        write_metadata(options.out_json, metadata)
    tally.finish(f"{options.part} of images")


def metadata_key(path: str, *, full_path: bool) -> str:
    """The name of an image in a metadata file: its stem, or the absolute path, which no working folder changes."""
    return os.path.abspath(path) if full_path else os.path.splitext(os.path.basename(path))[0]


def read_metadata(path: str) -> dict[str, dict[str, Any]]:
    """Image -> entry. ConfigError with every faulty entry."""
    from library.dataset.metadata_files import read_metadata_file

    return {entry.key: entry.values for entry in read_metadata_file(path)}


def write_metadata(path: str, metadata: Mapping[str, Mapping[str, Any]]) -> None:
    """A JSON object, or a line for each image in a file that ends in .jsonl, in UTF-8; complete or not at all."""
    from library.core.atomic_file import write_text_atomically

    if path.lower().endswith(".jsonl"):
        lines = [json.dumps({"image_path": key, **entry}, ensure_ascii=False) for key, entry in metadata.items()]
        write_text_atomically(path, "".join(f"{line}\n" for line in lines))
    else:
        write_text_atomically(path, json.dumps(metadata, ensure_ascii=False, indent=2) + "\n")
