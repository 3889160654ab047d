"""Clean the tags and captions of a metadata file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from library.core.options import Config, option
from library.scripts.folder_tool import DetailOptions, FolderTool, Tally, WriteOptions, logger, progress
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions
from tools.caption_tools.metadata import output_json_problems, read_metadata, write_metadata
from tools.caption_tools.text_rules import clean_caption, clean_tags


@dataclass(frozen=True, kw_only=True)
class CleanOptions:
    """What is cleaned"""

    in_json: str | None = option(None, help="metadata file with tags or captions")
    out_json: str | None = option(None, help="metadata file to write")


CLASSES = (CleanOptions, DetailOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool(
    "Clean the tags and captions of a metadata file: contradictions and repetitions among tags, words for people in "
    "captions",
    CLASSES,
    ("in_json", "out_json"),
)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def without_old_folder(words: list[str]) -> list[str]:
    """The words of a command without the folder of images, which stood before both files once."""
    places = [place for place, word in enumerate(words) if not word.startswith("-")]
    if len(places) != 3 or not os.path.isdir(words[places[0]]):
        return words
    logger.warning("%s is not needed; give in_json and out_json alone", words[places[0]])
    return words[: places[0]] + words[places[0] + 1 :]


def problems_of(config: Config) -> Iterator[str]:
    options = config[CleanOptions]
    if not os.path.isfile(options.in_json):
        yield f"in_json is {options.in_json}, which does not exist"
    yield from output_json_problems(options.out_json, options.in_json, config)


def run(argv: Sequence[str] | None = None) -> None:
    config = TOOL.read(without_old_folder(list(sys.argv[1:] if argv is None else argv)), problems_of)
    options, tally = config[CleanOptions], Tally()
    metadata = read_metadata(options.in_json)
    for key, entry in progress(list(metadata.items()), "cleaning"):
        cleaned = cleaned_entry(key, entry)
        if not {"tags", "caption"} & entry.keys():
            tally.skip("without tags and caption")
            continue
        if config[DetailOptions].debug and cleaned != entry:
            logger.info("%s: %s -> %s", key, entry, cleaned)
        metadata[key] = cleaned
        tally.done += 1
    if tally.done:
        write_metadata(options.out_json, metadata)
    tally.finish("entries")


def cleaned_entry(key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its tags and caption cleaned; one line in the log for each of them that it does not have."""
    cleaned = dict(entry)
    for part, clean in (("tags", clean_tags), ("caption", clean_caption)):
        value = entry.get(part)
        if value is None:
            logger.error("%s has no %s", key, part)
        elif isinstance(value, list):
            text = clean(", ".join(map(str, value)))
            cleaned[part] = text.split(", ") if text else []
        else:
            cleaned[part] = clean(value)
    return cleaned
