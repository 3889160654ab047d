"""What the image scripts share: reading options, ending with one message, prompt lines, seeds and sizes, picture files.

A script declares its option groups and a record of its own below `PictureRequest`, with a table of letters for prompt lines;
its models are in a pipeline file.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from library.core.errors import AtelierError, ConfigError, Problems
from library.core.options import Config, add_options, option, option_fields
from library.core.text_files import read_text
from library.generation.picture_files import settings_texts, write_picture
from library.training import cli
from library.training.option_groups import ConsoleOptions
from library.training.option_reader import OptionParser
from library.training.sampling_prompts import (
    DRAWN,
    LineOption,
    good_lines,
    parse_pieces,
    read_number,
    read_picture_side,
    read_seed,
    read_steps,
)

logger = logging.getLogger(__name__)

LARGEST_DRAWN_SEED = 2**32 - 1
DTYPE_NAMES: dict[str, str] = {
    "float32": "float32", "fp32": "float32", "float": "float32",
    "float16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float8_e4m3fn": "float8_e4m3fn", "fp8": "float8_e4m3fn", "fp8_e4m3fn": "float8_e4m3fn", "e4m3fn": "float8_e4m3fn",
}  # fmt: skip
"""spellings of a number format -> its name in torch"""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Where prompts come from"""

    interactive: bool = option(False, help="load the models once and ask for prompts, one per line; an empty line ends")
    from_file: str | None = option(None, help="text file with one prompt per line, with options behind it; # begins a comment line")
    no_metadata: bool = option(False, help="do not write prompt and settings into the picture files")

    def __post_init__(self) -> None:
        if self.interactive and self.from_file:
            raise ConfigError("--interactive and --from_file are both given; prompts come from one place, leave one out")


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """One picture, as asked for. `multipliers`: strengths of the adapters, None = as loaded."""

    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    steps: int | None = None
    seed: int | None = None
    cfg_scale: float = 1.0
    multipliers: tuple[float, ...] | None = None


Request = TypeVar("Request", bound=PictureRequest)


def read_negative(text: str) -> str:
    """A negative prompt of a line; `-` stands for an empty one."""
    return "" if text == "-" else text


def read_multipliers(text: str) -> tuple[float, ...]:
    return tuple(read_number(part.strip()) for part in text.split(","))


COMMON_LINE_OPTIONS: Mapping[str, LineOption] = {
    "w": LineOption("width", read_picture_side), "h": LineOption("height", read_picture_side), "s": LineOption("steps", read_steps),
    "d": LineOption("seed", read_seed), "n": LineOption("negative_prompt", read_negative),
    "m": LineOption("multipliers", read_multipliers),
}  # fmt: skip
"""letters of a prompt line that every image script has"""


# -- options ---------------------------------------------------------------------------------------------------------------


def script_parser(description: str, classes: Sequence[type]) -> argparse.ArgumentParser:
    parser = OptionParser(description=description, allow_abbrev=False, usage="%(prog)s [options]")
    for options_class in classes:
        add_options(parser, options_class)
    return parser


def read_command(argv: Sequence[str] | None, parser: argparse.ArgumentParser, classes: Sequence[type]) -> Config:
    """Every group, with all problems of all groups at once, and the log set up. ConfigError."""
    values = vars(parser.parse_args(argv))
    config = Config.read(values, classes)
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


def _unusual(config: Config) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, spec) of options that differ from their defaults."""
    for group in config.classes():
        for name, (field, spec) in option_fields(group).items():
            if config.value(name) != field.default:
                yield name, config.value(name), spec


def dtype_problem(name: str, value: str | None) -> str | None:
    """A message for a number format that is not known, or None."""
    if value is None or value.lower() in DTYPE_NAMES:
        return None
    return f"--{name} is '{value}'; known: {', '.join(DTYPE_NAMES)}"


def format_problems(names: Mapping[str, str], device: str | None = None) -> list[str]:
    """What the device cannot compute with of the formats asked for, {flag with its value: name in torch}."""
    from library.device_utils import format_problem

    instead = "choose another format: float32 works everywhere"
    return [problem for flag, dtype in names.items() if (problem := format_problem(flag, dtype, device, instead))]


def too_small_problems(values: Any, *least: tuple[str, int]) -> list[str]:
    """Messages for options of a group that are below their least value; None passes."""
    return [
        f"--{name} is {getattr(values, name)}; needed: {number} or more"
        for name, number in least
        if getattr(values, name) is not None and getattr(values, name) < number
    ]


def run_to_exit(run: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None) -> None:
    """Call `run(argv)`; an error ends the process with its exit code and one message."""
    code = cli.exit_code(lambda: run(argv))
    if code:
        sys.exit(code)


# -- prompts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LineReader:
    """Reads prompt lines on top of a request. `check` gives what is wrong with a finished request."""

    options: Mapping[str, LineOption]
    size_step: int
    check: Callable[[Any], list[str]] = lambda request: []

    def read(self, line: str, default: Request, where: str = "prompt") -> Request:
        """`PROMPT --w 512 --d 7 ...`; a line without a prompt keeps that of `default`. ConfigError with every problem."""
        text = line.strip()
        has_prompt = re.match(r"--[A-Za-z]", text) is None
        prompt, changes = parse_pieces(text if has_prompt else f"- {text}", where, self.options)
        request = dataclasses.replace(default, prompt=prompt if has_prompt and prompt else default.prompt, **changes)
        problems = [
            f"{where}: {name} is {getattr(request, name)}; needed: {least} or more"
            for name, least in (("width", self.size_step), ("height", self.size_step), ("steps", 1))
            if name in changes and getattr(request, name) < least
        ]
        problems += [f"{where}: {problem}" for problem in self.check(request)]
        if problems:
            raise ConfigError(problems)
        return request

    def read_file(self, path: str, default: Request) -> list[Request]:
        """One request per line; blank lines and lines that begin with # are left out. A line that is wrong is told and left out;
        ConfigError with every problem where none is right."""
        lines = read_text(path, f"--from_file is {path}, which").splitlines()
        given = [(f"{path} line {number}", line) for number, line in enumerate(lines, start=1) if line.strip() and not line.startswith("#")]
        if not given:
            raise ConfigError(f"--from_file is {path}; there is no prompt in the file")
        return good_lines(given, lambda entry: self.read(entry[1], default, entry[0]))

    def typed(self, default: Request) -> Iterator[Request]:
        """What is typed, until an empty line or the end of input. A line that is wrong is told and asked for again."""
        print(f"Enter a prompt; options behind it: {' '.join('--' + letter for letter in self.options)}; an empty line ends")
        while True:
            try:
                line = input("> ")
            except EOFError:
                return
            if not line.strip():
                return
            try:
                request = self.read(line, default)
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr)
            else:
                yield request


def planned_requests(
    options: SessionOptions, first: Request, reader: LineReader, check: Callable[[], None] = lambda: None
) -> Iterable[Request]:
    """The requests of a run, with a file read and checked whole before any model is loaded. ConfigError with every problem,
    those that `check` raises among them."""
    problems = Problems()
    problems.attempt(check)
    requests: Iterable[Request] = reader.typed(first) if options.interactive else [first]
    if options.from_file:
        requests = problems.attempt(lambda: reader.read_file(options.from_file, first)) or []
    elif not options.interactive:
        for problem in reader.check(first):
            problems.add(problem)
    problems.raise_if_any()
    return requests


def with_seed_and_size(request: Request, size_step: int) -> Request:
    """Sides rounded down to a multiple of `size_step`, and a drawn seed where none is given."""
    width, height = (side - side % size_step for side in (request.width, request.height))
    if (width, height) != (request.width, request.height):
        logger.warning("the size is %dx%d; made %dx%d, a multiple of %d", request.width, request.height, width, height, size_step)
    seed = random.SystemRandom().randint(0, LARGEST_DRAWN_SEED) if request.seed in (None, DRAWN) else request.seed
    return dataclasses.replace(request, width=width, height=height, seed=seed)


# -- files -----------------------------------------------------------------------------------------------------------------


def output_name(seed: int | None, index: int, ending: str = ".png") -> str:
    """`{YYYYmmdd_HHMMSS}_{seed}_{index}`: pictures of one second stay apart."""
    return f"{time.strftime('%Y%m%d_%H%M%S')}_{'' if seed is None else f'{seed}_'}{index:02d}{ending}"


def picture_texts(request: PictureRequest, **more: Any) -> dict[str, str]:
    """Text entries of a request's picture file."""
    return settings_texts(
        prompt=request.prompt, negative_prompt=request.negative_prompt, seed=request.seed, steps=request.steps,
        scale=request.cfg_scale, **more,
    )  # fmt: skip


def make_each(requests: Iterable[Request], make: Callable[[Request, int], Path]) -> list[Path]:
    """`make(request, number)` for each; one log line per file. A picture that cannot be made is told, and the others are;
    AtelierError at the end."""
    paths, failed, last = [], 0, None
    for index, request in enumerate(requests):
        started = time.perf_counter()
        try:
            paths.append(make(request, index))
        except AtelierError as error:
            failed, last = failed + 1, error
            logger.error("picture %d: %s", index, error)
            continue
        logger.info("%s: %.1f s", paths[-1], time.perf_counter() - started)
    if last is not None and not paths and failed == 1:
        raise last
    if failed:
        raise AtelierError(f"{failed} of {failed + len(paths)} pictures could not be made; the reasons stand above, the others are written")
    return paths
