"""The tool that edits metadata: its options, its checks, and the order of things. What is removed is in
library/checkpoints/metadata.py."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from library.core.errors import ConfigError, Problems
from library.core.options import Config, option
from library.scripts.command_line import script_parser
from library.scripts.tool_script import OutputOptions, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions
from tools.lora_tools.adapter_input import add_files, read_with_files

logger = logging.getLogger("atelier")

STRIPS = ("tags", "folders", "all")
THUMBNAIL = "modelspec.thumbnail"
LISTED = 12


@dataclass(frozen=True, kw_only=True)
class MetadataEditOptions:
    """What is changed"""

    model: str | None = option(
        None, help="safetensors file of any kind; it can be given without the name of the option too"
    )
    save_to: str | None = option(None, help="the file to write")
    in_place: bool = option(False, help="put the result in the place of the file; it is replaced whole, or not at all")
    strip: list[str] | None = option(
        None,
        nargs="+",
        choices=(None, *STRIPS),
        help="tags: words of the captions and how often they are; folders: names of image folders; all: everything that loaders do not need",
    )
    remove: list[str] | None = option(
        None, nargs="+", metavar="KEY", help="keys to remove; * stands for any text, e.g. 'ss_*'"
    )
    set: list[str] | None = option(None, nargs="+", metavar="KEY=VALUE", help="keys to write, each with its text")
    thumbnail: str | None = option(
        None, metavar="PICTURE", help=f"picture to put in as {THUMBNAIL}, which galleries and web interfaces show"
    )
    thumbnail_size: int = option(256, help="longest side of it in pixels")


CLASSES = (MetadataEditOptions, OutputOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    return add_files(
        script_parser("Take out, change or add metadata of a safetensors file", CLASSES), "model", "safetensors file"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """AtelierError with one message for whatever is wrong; nothing is written then."""
    config = read_with_files(argv, build_parser(), CLASSES, "model")
    options = config[MetadataEditOptions]
    check(config)

    from library.checkpoints.metadata import rewrite_metadata, with_hashes
    from library.checkpoints.safetensors_header import read_header

    before = dict(read_header(options.model)[1])
    after = edited(before, options)
    if options.thumbnail:
        after[THUMBNAIL] = thumbnail_url(options.thumbnail, options.thumbnail_size)
    after = with_hashes(options.model, after)
    tell(before, after)
    target = options.model if options.in_place else options.save_to
    _tell_lost_config(options.model, before, target, after)
    if config[OutputOptions].dry_run:
        return
    rewrite_metadata(options.model, target, after)
    logger.info("wrote %s", target)


def _tell_lost_config(source: str, before: Mapping[str, str], target: str, after: Mapping[str, str]) -> None:
    """PEFT keeps the strength in a file beside the adapter, which no rewriting of metadata carries along."""
    from networks.files.peft_config import CONFIG_FILE, configs_of

    if configs_of(source, before) != configs_of(target, after):
        logger.warning(
            "the strength of %s stands in the %s beside it; copy that beside the result and call the result %s, else "
            "it acts at another strength",
            source,
            CONFIG_FILE,
            os.path.basename(source),
        )


def check(config: Config) -> None:
    """ConfigError with every problem that the options show."""
    options, problems = config[MetadataEditOptions], Problems()
    for found in _problems(options):
        problems.add(found)
    if options.save_to and not options.in_place:
        for found in output_problems([options.save_to], [options.model, options.thumbnail], config):
            problems.add(found)
    problems.raise_if_any()


def _problems(options: MetadataEditOptions) -> Iterator[str]:
    from library.checkpoints.metadata import HASHES, NEEDED

    if not options.model:
        yield "--model is missing; name the safetensors file"
    if bool(options.save_to) == options.in_place:
        yield "--save_to and --in_place are " + (
            "both given; leave one of them out" if options.in_place else "missing; say where the result goes"
        )
    if not (options.strip or options.remove or options.set or options.thumbnail):
        yield "there is nothing to change; give --strip, --remove, --set or --thumbnail"
    if options.save_to and not options.save_to.endswith(".safetensors"):
        yield f"--save_to is {options.save_to}; needed: a name that ends in .safetensors"
    pairs = [text.partition("=") for text in options.set or ()]
    for key, equals, _ in pairs:
        if not equals or not key:
            yield f"--set has {key}; needed: KEY=VALUE, in quotes where the value has spaces"
        elif key in HASHES:
            yield f"--set {key}: the hashes are those of the file's content; leave it out"
    for key in (*(key for key, _, _ in pairs), *(options.remove or ())):
        if key in NEEDED:
            yield f"{key} says how the tensors are to be read, without which the file acts otherwise; leave it as it is"
    if options.thumbnail_size < 16 or options.thumbnail_size > 2048:
        yield f"--thumbnail_size is {options.thumbnail_size}; needed: 16 to 2048"
    if options.thumbnail and not os.path.isfile(options.thumbnail):
        yield f"--thumbnail is {options.thumbnail}; there is no such file"


def edited(metadata: Mapping[str, str], options: MetadataEditOptions) -> dict[str, str]:
    """The metadata after --strip, --remove and --set, in this order. ConfigError for a pattern of --remove that fits no
    key."""
    from library.checkpoints.metadata import NEEDED, stripped

    result = dict(metadata)
    for what in options.strip or ():
        result = stripped(result, what)
    problems = Problems()
    for pattern in options.remove or ():
        found = [key for key in metadata if fnmatchcase(key, pattern) and key not in NEEDED]
        if not found:
            problems.add(
                f"--remove has {pattern}; no key of {options.model} is called so "
                f"({', '.join(list(metadata)[:LISTED]) or 'it has none'} ...)"
            )
        for key in found:
            result.pop(key, None)
    problems.raise_if_any()
    for text in options.set or ():
        key, _, value = text.partition("=")
        result[key] = value
        if key in ("ss_network_alpha", "ss_network_dim"):
            logger.warning("--set %s changes what is told; rank and strength themselves are those of the tensors", key)
    return result


def thumbnail_url(path: str, size: int) -> str:
    """The picture, no larger than `size`, as a data URL. ConfigError when it cannot be read."""
    import base64
    import io

    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.thumbnail((size, size), Image.Resampling.LANCZOS)
            flat = Image.new("RGB", picture.size, "white")
            mask = picture.convert("RGBA") if picture.mode in ("RGBA", "LA", "PA", "P") else None
            flat.paste(mask or picture.convert("RGB"), mask=mask)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"--thumbnail is {path}, which is no picture that can be read ({error}); needed: a PNG, JPEG or WebP file"
        ) from error
    data = io.BytesIO()
    flat.save(data, format="JPEG", quality=88, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def tell(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """One line for each way in which keys change."""
    removed, added = [key for key in before if key not in after], [key for key in after if key not in before]
    changed = [key for key in after if key in before and before[key] != after[key]]
    for what, keys in (("removed", removed), ("changed", changed), ("added", added)):
        if keys:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            logger.info("%s: %s%s", what, ", ".join(keys[:LISTED]), more)
    logger.info("%d keys before, %d after", len(before), len(after))
