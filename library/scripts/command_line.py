"""The command lines of scripts and tools that do not train: parser, reading, errors."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from library.core.console import utf8_text
from library.core.errors import Problems
from library.core.options import Config, MissingGroup, add_options, option_fields
from library.training import cli
from library.training.option_groups import ConsoleOptions
from library.training.option_reader import OptionParser

logger = logging.getLogger(__name__)

PROMPTS = frozenset({"prompt", "negative_prompt"})
"""options that models read as text; other ones may be names of files, in any encoding"""


def script_parser(description: str, classes: Sequence[type]) -> argparse.ArgumentParser:
    parser = OptionParser(description=description, allow_abbrev=False, usage="%(prog)s [options]")
    for options_class in classes:
        add_options(parser, options_class)
    return parser


def read_command(
    argv: Sequence[str] | None,
    parser: argparse.ArgumentParser,
    classes: Sequence[type],
    check: Callable[[Config], None] = lambda config: None,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values,
) -> Config:
    """Every group, with all problems of all groups at once, and the log set up. ConfigError.

    `complete` may add values to those that were given, by option. `check` adds what else is wrong where groups could not be read, as far as it does not need them.
    """
    values = complete(vars(parser.parse_args(argv)))
    problems = Problems()
    for name in PROMPTS & values.keys():
        values[name] = problems.attempt(lambda name=name: values[name] and utf8_text(values[name], f"--{name}"))
    problems.raise_if_any()
    config, problems = Config.read_partly(values, classes)
    if problems.messages:
        with suppress(MissingGroup):
            problems.attempt(lambda: check(config))
    problems.raise_if_any()
    cli.set_up_logging(config[ConsoleOptions])
    return config


def refused_problems(config: Config) -> list[str]:
    """Options of other scripts that ask for something which this one does not have."""
    return [f"--{name} is {value}: {spec.reason}" for name, value, spec in _unusual(config) if spec.status == "refused"]


def tell_equivalent(config: Config) -> None:
    """One log line for each option that chooses among ways with equal results."""
    for _, _, spec in _unusual(config):
        if spec.status == "equivalent":
            logger.info(spec.reason)


def tell_ignored(config: Config) -> None:
    """One log line for each option that means nothing here."""
    for name, value, spec in _unusual(config):
        if spec.status == "ignored":
            logger.warning("--%s %s is ignored: %s", name, value, spec.reason)


def _unusual(config: Config) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, spec) of options that differ from their defaults."""
    for group in config.classes():
        for name, (field, spec) in option_fields(group).items():
            if config.value(name) != field.default:
                yield name, config.value(name), spec


def run_to_exit(run: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None) -> None:
    """Call `run(argv)`; an error ends the process with its exit code and one message."""
    code = cli.exit_code(lambda: run(argv))
    if code:
        sys.exit(code)
