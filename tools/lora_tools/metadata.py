"""The metadata tool: what a safetensors file says of itself, as JSON."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.core.errors import ConfigError
from library.core.options import option
from library.scripts.command_line import script_parser
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions
from tools.lora_tools.adapter_input import add_files, read_with_files

logger = logging.getLogger("atelier")


@dataclass(frozen=True, kw_only=True)
class MetadataToolOptions:
    """What is shown"""

    model: str | None = option(None, help="safetensors file; it can be given without the name of the option too")
    decode: bool = option(False, help="show values that are JSON themselves as such, not as one escaped text")


CLASSES = (MetadataToolOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    return add_files(
        script_parser("Print the metadata of a safetensors file as JSON", CLASSES), "model", "safetensors file"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """Print the entries, sorted; a line in the log when there are none."""
    options = read_with_files(argv, build_parser(), CLASSES, "model")[MetadataToolOptions]
    if not options.model:
        raise ConfigError("--model is missing; name the safetensors file")

    from library.safetensors_utils import read_header

    metadata: dict[str, Any] = dict(read_header(options.model)[1])
    if not metadata:
        logger.info("%s has no metadata", options.model)
        return
    if options.decode:
        metadata = {key: decoded(value) for key, value in metadata.items()}
    print(json.dumps(metadata, indent=4, sort_keys=True, ensure_ascii=False))


def decoded(text: str) -> Any:
    """The value of a text that is a JSON object or list, at any depth; other texts as they are."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return _deep(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _deep(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _deep(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_deep(part) for part in value]
    return decoded(value) if isinstance(value, str) else value
