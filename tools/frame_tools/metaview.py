"""What made files tell: their entries as lines or JSON, and the command line that makes them again."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.core.errors import AtelierError, ConfigError, Problems
from library.core.options import ignored_option, option
from library.scripts.command_line import script_parser
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions
from tools.lora_tools.adapter_input import add_files, read_with_files

logger = logging.getLogger("atelier")

FIRST = (
    "model_type", "task", "prompt", "prompt2", "negative_prompt", "nag_prompt", "seed", "seeds", "steps", "infer_steps",
    "embedded_cfg_scale", "guidance", "scale", "guidance_scale", "cfg_schedule", "fps",
)  # fmt: skip
"""entries that stand before the others, in this order"""
SETTINGS = "settings"
_NO_WINDOW = "entries are printed, one a line; there is no window"


@dataclass(frozen=True, kw_only=True)
class MetaviewOptions:
    """What is shown"""

    files: list[str] | None = option(
        None, nargs="*", help="pictures (PNG, WebP, JPEG), videos and files of latents; they can be given without the"
        " name of the option too",
    )  # fmt: skip
    json: bool = option(False, help="the entries as JSON: one object, of several files by their names")
    command: bool = option(False, help="the command line that makes the file again")
    columns: int | None = ignored_option(None, help="columns of a window", reason=_NO_WINDOW)
    max_rows: int | None = ignored_option(
        None, help="rows of a window", reason=_NO_WINDOW, flags=("--max-rows",)
    )

    def __post_init__(self) -> None:
        if self.json and self.command:
            raise ConfigError("--json and --command are both given; leave one out")


CLASSES = (MetaviewOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Show what made pictures, videos and latents tell of how they were made", CLASSES)
    return add_files(parser, "files", "pictures, videos and files of latents")


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """Print what each file tells; ConfigError with all files that cannot be read, after the others are shown."""
    from library.generation.recorded_files import read_file_texts
    from library.scripts.command_line import tell_ignored

    config = read_with_files(argv, build_parser(), CLASSES, "files")
    tell_ignored(config)
    options, problems, found = config[MetaviewOptions], Problems(), {}
    if not options.files:
        raise ConfigError("--files is missing; name pictures, videos or files of latents")
    for path in options.files:
        try:
            texts = read_file_texts(path)
            entries_of(texts, path)  # a damaged file is told beside the others
            found[path] = texts
        except AtelierError as error:
            problems.add(str(error))
    if options.command:
        for path, texts in found.items():
            problems.attempt(lambda: print(command_of(texts, path)))
    elif options.json:
        shown = {path: entries_of(texts, path) for path, texts in found.items()}
        one = len(options.files) == len(shown) == 1
        print(json.dumps(next(iter(shown.values())) if one else shown, indent=4, ensure_ascii=False))
    else:
        print("\n\n".join(as_lines(path, texts, len(options.files) > 1) for path, texts in found.items()))
    problems.raise_if_any()


def entries_of(texts: Mapping[str, str], path: str) -> dict[str, Any]:
    """Entries by name in the order in which they are shown: those of known programs without their prefix, our own
    settings as an object."""
    from library.generation.recorded_files import PREFIX
    from library.generation.recorded_requests import ENTRY, RecordedSettings

    named = {name.lower().removeprefix(PREFIX): text for name, text in texts.items() if name != ENTRY}
    places = {name: number for number, name in enumerate(FIRST)}
    order = sorted(named, key=lambda name: (places.get(name.replace("-", "_"), len(FIRST)), name))
    found: dict[str, Any] = {name: named[name] for name in order}
    if ENTRY in texts:
        settings = RecordedSettings.of_text(texts[ENTRY], path)
        found[SETTINGS] = {"script": settings.script, "options": settings.options, "line": settings.line}
    return found


def as_lines(path: str, texts: Mapping[str, str], with_name: bool) -> str:
    """`name: value` for each entry; lines of a value after the first are indented."""
    entries = entries_of(texts, path)
    settings = entries.pop(SETTINGS, None)
    lines = [f"{name}: " + str(value).replace("\n", "\n    ") for name, value in entries.items()]
    if settings:
        lines.append(f"command: {command_of(texts, path)}")
    return "\n".join([*([f"{path}:"] if with_name else []), *(lines or ["no entries"])])


def command_of(texts: Mapping[str, str], path: str) -> str:
    """The command line of a file's settings; what only a prompt line can say is taken from the file by it. ConfigError
    for a file without settings."""
    import shlex

    from library.generation.recorded_files import told_fields
    from library.generation.recorded_requests import ENTRY, RecordedSettings

    if ENTRY not in texts:
        if "prompt" not in told_fields(texts):
            raise ConfigError(f"{path} has no {ENTRY} and no prompt, so no command line makes it again")
        raise ConfigError(
            f"{path} has no {ENTRY}, so which script and models have made it is not told; its prompt and seed are taken"
            f" by --from_metadata={path} beside the models"
        )
    settings = RecordedSettings.of_text(texts[ENTRY], path)
    return shlex.join([*settings.words, *([f"--from_metadata={path}"] if settings.line else [])])
