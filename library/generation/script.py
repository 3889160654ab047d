"""What the image scripts share: the order of things, reading options, prompt lines, seeds and sizes, picture files.

The script of a family is an `ImageScript`: its option groups and requests are in `<family>_options.py`, its models in
`<family>_pipeline.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from library.core.atomic_file import unwritable_problem
from library.core.console import utf8_text
from library.core.errors import AtelierError, CheckpointError, ConfigError, Problems, problems_of
from library.core.options import Config, option_fields
from library.core.registry import import_target
from library.core.text_files import read_text
from library.families.registry import record_of, records
from library.generation.adapter_files import EmbeddingOptions, multiplier_problems
from library.generation.guidance_options import GuidanceOptions, idle_guidance, request_guidance_problems
from library.generation.picture_files import settings_texts, write_picture
from library.generation.preview_options import PreviewOptions
from library.generation.recorded_requests import ENTRY, RecordedSettings, shaping_options
from library.generation.requests import PictureRequest, Request, SessionOptions, taken_seed
from library.generation.step_options import STEP_GROUPS
from library.generation.wildcards import prompts_of, wildcard_problems, with_drawn_words
from library.scripts.command_line import (
    read_command,
    refused_problems,
    run_to_exit,
    script_parser,
    tell_equivalent,
    tell_ignored,
)
from library.training.parser_common import chosen_variant, early_values
from library.training.sampling_prompts import LineOption, good_lines, parse_pieces

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.embeddings import Widths, WordVectors
    from library.families.latents import SideLimit
    from library.generation.pipeline import PictureMaker

logger = logging.getLogger(__name__)


# -- options -----------------------------------------------------------------------------------------------------------


def format_problems(names: Mapping[str, str], device: str | None = None) -> list[str]:
    """What the device cannot compute with of the formats asked for, {flag with its value: name in torch}."""
    from library.device_utils import format_problem

    instead = "choose another format: float32 works everywhere"
    return [problem for flag, dtype in names.items() if (problem := format_problem(flag, dtype, device, instead))]


def filled(values: dict[str, Any], groups: Sequence[type], told: list[str]) -> dict[str, Any]:
    """Values of options by name, with those that --optimized sets; see `optimized.with_optimized`."""
    if not values.get("optimized"):
        return values
    from library.generation.optimized import with_optimized

    return with_optimized(values, groups, told)


# -- prompts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LineReader:
    """Reads prompt lines on top of a request. `check` gives what is wrong with a finished request."""

    options: Mapping[str, LineOption]
    size_step: int
    check: Callable[[Any], list[str]] = lambda request: []

    def read(self, line: str, default: Request, where: str = "prompt") -> Request:
        """`PROMPT --w 512 --d 7 ...`; a line without a prompt keeps that of `default`. ConfigError with every
        problem."""
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
        """One request per line; blank lines and lines that begin with # are left out. A line that is wrong is told and
        left out; ConfigError with every problem where none is right."""
        lines = read_text(path, f"--from_file is {path}, which").splitlines()
        given = [
            (f"{path} line {number}", line)
            for number, line in enumerate(lines, start=1)
            if line.strip() and not line.startswith("#")
        ]
        if not given:
            raise ConfigError(f"--from_file is {path}; there is no prompt in the file")
        return good_lines(given, lambda entry: self.read(entry[1], default, entry[0]))

    def typed(self, default: Request) -> Iterator[Request]:
        """What is typed, until an empty line or the end of input. A line that is wrong is told and asked for again."""
        print(
            f"Enter a prompt; options behind it: {' '.join('--' + letter for letter in self.options)}; an empty line "
            "ends"
        )
        ask = line_asker()
        while True:
            try:
                line = ask("> ")
            except EOFError:
                return
            if not line.strip():
                return
            try:
                request = self.read(utf8_text(line, "what was typed"), default)
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr)
            else:
                yield request


def line_asker() -> Callable[[str], str]:
    """What reads a typed line: with a history and editing where the package prompt_toolkit is there and a person
    types."""
    if sys.stdin is None or not sys.stdin.isatty():
        return input
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return input
    return PromptSession().prompt


def planned_requests(
    options: SessionOptions, first: Request, reader: LineReader, check: Callable[[], None] = lambda: None
) -> Iterable[Request]:
    """The requests of a run, with a file read and checked whole before any model is loaded. ConfigError with every
    problem, those that `check` raises among them."""
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


def rounded_sides(request: PictureRequest, size_step: int) -> tuple[int, int]:
    """Width and height of the picture that is made."""
    return request.width - request.width % size_step, request.height - request.height % size_step


def with_seed_and_size(request: Request, size_step: int) -> Request:
    """Sides rounded down to a multiple of `size_step`, and a drawn seed where none is given."""
    width, height = rounded_sides(request, size_step)
    if (width, height) != (request.width, request.height):
        logger.warning(
            "the size is %dx%d; made %dx%d, a multiple of %d", request.width, request.height, width, height, size_step
        )
    return dataclasses.replace(request, width=width, height=height, seed=taken_seed(request))


# -- files -------------------------------------------------------------------------------------------------------------


def output_name(seed: int | None, index: int, ending: str = ".png") -> str:
    """`{YYYYmmdd_HHMMSS}_{seed}_{index}`: pictures of one second stay apart."""
    return f"{time.strftime('%Y%m%d_%H%M%S')}_{'' if seed is None else f'{seed}_'}{index:02d}{ending}"


def unused_path(folder: str | os.PathLike[str], seed: int | None, index: int, ending: str = ".png") -> Path:
    """A file of `output_name` in `folder`. Where another call of the same second has made such a file, or latents of
    that name, it has a number behind it: `{YYYYmmdd_HHMMSS}_{seed}_{index}_2.png`."""
    return free_path(folder, output_name(seed, index, ""), ending)


def free_path(folder: str | os.PathLike[str], name: str, ending: str = ".png") -> Path:
    """A file of this name in `folder`, or with a number behind the name where there is such a file."""
    there = {path.name for path in Path(folder).iterdir()} if Path(folder).is_dir() else set()
    stem, number = name, 1
    while any(other.startswith(stem) for other in there):
        number += 1
        stem = f"{name}_{number}"
    return Path(folder) / f"{stem}{ending}"


def picture_texts(request: PictureRequest, **more: Any) -> dict[str, str]:
    """Text entries of a request's picture file."""
    return settings_texts(
        prompt=request.prompt, negative_prompt=request.negative_prompt, seed=request.seed, steps=request.steps,
        scale=request.cfg_scale, frames=request.frames if request.frames > 1 else None, **more,
    )  # fmt: skip


class Failures:
    """Pictures, or what `kind` says, that could not be made: each is told, and the run goes on to its end."""

    def __init__(self, kind: str = "picture") -> None:
        self.kind = kind
        self.count = 0
        self.last: AtelierError | None = None

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Inside, an AtelierError is a line of the log that begins with `what`."""
        try:
            yield
        except AtelierError as error:
            self.count, self.last = self.count + 1, error
            logger.error("%s: %s", what, error)

    def raise_if_any(self, made: int) -> None:
        """AtelierError after the last picture; the reason itself where it was the only one."""
        if self.last is not None and not made and self.count == 1:
            raise self.last
        if self.count:
            raise AtelierError(
                f"{self.count} of {self.count + made} {self.kind}s could not be made; the reasons stand above, the others"
                " are written"
            )


def make_each(
    requests: Iterable[Request], make: Callable[[Request, int], Path], kind: str = "picture"
) -> list[Path]:
    """`make(request, number)` for each; one log line per file. One that cannot be made is told, and the others are;
    AtelierError at the end. `kind`: what is made, in words."""
    paths, failures = [], Failures(kind)
    for index, request in enumerate(requests):
        started = time.perf_counter()
        with failures.told(f"{kind} {index}"):
            paths.append(make(request, index))
            logger.info("%s: %.1f s", paths[-1], time.perf_counter() - started)
    failures.raise_if_any(len(paths))
    return paths


# -- the script --------------------------------------------------------------------------------------------------------


class ImageScript(ABC, Generic[Request]):
    """The image script of a family: its records, and what is done with them. The order of things is the same for
    all."""

    family: ClassVar[str]
    """whose script it is; an option may choose a variant of that family, which has an ImageScript of its own"""
    title: ClassVar[str]
    """the family in the text of --help"""
    adapters: ClassVar[type]
    """option group of the LoRA files: `num_adapters`, `adapters` (AdapterChoice), `merge_lora_weights`"""
    pictures: ClassVar[type]
    """option group of the pictures: `request` (the one that the options ask for), `output_dir`"""
    groups: ClassVar[Sequence[type]]
    """these and the groups that all scripts have, in the order of --help"""
    line_options: ClassVar[Mapping[str, LineOption]]
    size_step: ClassVar[int]
    kind: ClassVar[str] = "picture"
    """what is made, in messages"""
    texts: ClassVar[Mapping[str, str]] = {}
    """text entries of the picture files beside those that all have -> fields of the request"""
    option_names: ClassVar[Mapping[str, str]] = {}
    """fields of the request -> options of other names, where they hold what a prompt line can say"""
    recorded_with: ClassVar[Mapping[str, str]] = {}
    """fields -> another field whose default hangs on whether the option of the first is given, recorded with it"""
    size_option: ClassVar[str | None] = None
    """option of height and width, where one has both"""

    @abstractmethod
    def check(self, config: Config) -> None:
        """Every missing or wrong file at once, from headers; ConfigError."""

    @abstractmethod
    def load(self, config: Config) -> PictureMaker[Request]: ...

    def load_for(self, config: Config, requests: Iterable[Request]) -> PictureMaker[Request]:
        """`load`, for a script that takes account of what will be made: a list of all, or what is typed."""
        return self.load(config)

    def request_problems(self, config: Config, request: Request) -> list[str]:
        """What is wrong with one prompt and its settings, beside sizes and adapters."""
        return []

    def embedding_widths(self, config: Config) -> Widths:
        """Widths of the vectors that the text encoders take, from headers, where the script has EmbeddingOptions."""
        return {}

    def notices(self, config: Config) -> list[str]:
        """Lines for the log before the models are loaded."""
        return []

    def writes_pictures(self, config: Config) -> bool:
        """Whether picture files are among what is written."""
        return True

    def base_request(self, config: Config) -> Request:
        """What the options ask for, before lines of prompts change it."""
        request = config[self.pictures].request
        further = (group for group in (GuidanceOptions, *STEP_GROUPS) if group in config)
        fields = {name: value for group in further for name, value in config[group].request_fields().items()}
        return dataclasses.replace(request, **fields) if fields else request

    def completed(self, request: Request, maker: PictureMaker[Request]) -> Request:
        return with_seed_and_size(request, self.size_step)

    def chosen(self, argv: Sequence[str] | None) -> ImageScript[Any]:
        """This one, or that of the variant which an option chooses instead (`FamilyRecord.variant_of`), here or in the
        file of --from_metadata."""
        from library.generation.recorded_files import settings_of_file

        words = list(sys.argv[1:] if argv is None else argv)
        path = early_values(argv, ["from_metadata"]).get("from_metadata")
        if path and Path(path).is_file():
            recorded = settings_of_file(path, self.script_file, self.as_options).options
            words = [*(f"--{name}={recorded[name]}" for name in self.variant_options if name in recorded), *words]
        record = record_of(chosen_variant(self.family, words))
        return import_target(record.image_script) if record.name != self.family and record.image_script else self

    def build_parser(self) -> argparse.ArgumentParser:
        return script_parser(f"Make images with {self.title}", self.groups)

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Read the options, load, make the pictures; ends the process with the exit code of an error and one
        message."""
        run_to_exit(self.run, argv)

    def run(self, argv: Sequence[str] | None = None) -> list[Path]:
        """`main` without the handling of errors; returns the files that were written."""
        script, told = self.chosen(argv), list[str]()

        def complete(values: dict[str, Any]) -> dict[str, Any]:
            return filled(script.with_recorded(values), script.groups, told)

        config = read_command(argv, script.build_parser(), script.groups, script.check, complete)
        from library.generation.speed import set_switches

        for line in told:
            logger.info(line)
        tell_equivalent(config)
        tell_ignored(config)
        set_switches(config)
        return script.make_all(config)

    def make_all(self, config: Config) -> list[Path]:
        from library.generation.attention import choose_attention
        from library.generation.speed import choose_products, speed_notices

        first, reader = self.first_request(config), self.line_reader(config)
        requests = planned_requests(config[SessionOptions], first, reader, lambda: self._check_all(config))
        requests = with_drawn_words(requests, config[SessionOptions].prompt_wildcards)
        files = config[SessionOptions].idle_file_options(config.explicit, self.writes_pictures(config))
        previews = config[PreviewOptions].notices() if PreviewOptions in config else []
        idle = [*speed_notices(config), *self._idle_guidance(config, first)]
        for line in [*self.notices(config), *previews, *idle, *files]:
            logger.info(line)
        adapters = config[self.adapters]
        if adapters.merge_lora_weights and "merge_lora_weights" in config.explicit and not adapters.num_adapters:
            logger.warning("--merge_lora_weights has no effect: there are no adapters")
        maker = self.load_for(config, requests)
        choose_products(maker.pipeline.denoiser, config)
        choose_attention(maker.pipeline.denoiser, config)
        self._add_words(maker, config)
        self._add_previews(maker, config)
        maker.weighs_words = config[SessionOptions].prompt_weighting
        return make_each(requests, lambda request, index: self.make_picture(maker, config, request, index), self.kind)

    def _idle_guidance(self, config: Config, first: Request) -> list[str]:
        """Lines about options of guidance that change nothing; lines of prompts may yet ask for what they need."""
        if config[SessionOptions].from_file or config[SessionOptions].interactive:
            return []
        return idle_guidance(first, config.explicit)

    def _check_all(self, config: Config) -> None:
        from library.generation.attention import attention_of
        from library.generation.speed import speed_problems

        problems = Problems()
        for problem in refused_problems(config):
            problems.add(problem)
        found = problems_of(lambda: self.check(config))
        for problem in [*attention_of(config).problems, *self._folder_problems(config), *self._weight_problems(config)]:
            problems.add(problem)
        for problem in [*speed_problems(config), *self._preview_problems(config)]:
            problems.add(problem)
        for problem in [*found, *self._word_problems(config, has_model=not found)]:
            problems.add(problem)
        problems.raise_if_any()

    def _weight_problems(self, config: Config) -> list[str]:
        if not config[SessionOptions].prompt_weighting or record_of(self.family).weighted_texts:
            return []
        able = sorted(name for name, record in records().items() if record.weighted_texts)
        return [
            f"--prompt_weighting: {self.title} has no text encoder whose words can be weighed so; families that have one:"
            f" {', '.join(able)} (gen_img.py always weighs words)"
        ]

    def _folder_problems(self, config: Config) -> list[str]:
        pictures = config[self.pictures]
        option = "save_path" if hasattr(pictures, "save_path") else "output_dir"
        problem = pictures.output_dir and unwritable_problem(option, pictures.output_dir)
        return [problem] if problem else []

    def _word_problems(self, config: Config, has_model: bool) -> list[str]:
        """What is wrong with files of textual inversions; for the text encoders where there are such."""
        from library.generation.words import missing_files

        if EmbeddingOptions not in config:
            return []
        if not has_model:
            files = config[EmbeddingOptions].textual_inversion_embeddings or ()
            return missing_files(files, "textual_inversion_embeddings")
        return problems_of(lambda: self._words(config))

    def _words(self, config: Config) -> list[WordVectors]:
        """The words of --textual_inversion_embeddings and those in the files of adapters. ConfigError."""
        from library.checkpoints.embeddings import bundled_rows
        from library.generation.words import read_words

        files = config[EmbeddingOptions].textual_inversion_embeddings or []
        adapters = [file.path for file in config[self.adapters].adapters.files]
        if not files and not any(map(bundled_rows, adapters)):
            return []
        bundles = [("lora_weights", path) for path in adapters]
        return read_words(files, bundles, self.embedding_widths(config), "textual_inversion_embeddings")

    def _add_words(self, maker: PictureMaker[Request], config: Config) -> None:
        for word in self._words(config) if EmbeddingOptions in config else ():
            maker.words.add(word)

    # -- previews ------------------------------------------------------------------------------------------------------

    def _preview_problems(self, config: Config) -> list[str]:
        if PreviewOptions not in config or not config[PreviewOptions].preview_latent_every:
            return []
        from library.generation.previews import preview_problems

        return preview_problems(self.family, config[PreviewOptions].preview_vae)

    def _add_previews(self, maker: PictureMaker[Request], config: Config) -> None:
        options = config[PreviewOptions] if PreviewOptions in config else None
        if options is None or not options.preview_latent_every:
            return
        from library.generation.previews import previews_of

        pictures = config[self.pictures]
        folder = Path(pictures.save_path if hasattr(pictures, "save_path") else pictures.output_dir)
        fps = getattr(pictures, "fps", None) or 1
        maker.pipeline.observe = previews_of(
            self.family, folder, options.preview_latent_every, options.preview_vae, fps
        )

    def side_limit(self, config: Config) -> SideLimit | None:
        """How large pictures may be, from the header of the model; None: as large as one likes. CheckpointError."""
        return None

    def line_reader(self, config: Config) -> LineReader:
        adapters = config[self.adapters]
        count, merged = adapters.num_adapters, adapters.merge_lora_weights

        @functools.cache
        def limit() -> SideLimit | None:
            try:
                return self.side_limit(config)
            except (CheckpointError, OSError):
                return None  # `check` tells of the file

        def problems(request: Request) -> list[str]:
            width, height = rounded_sides(request, self.size_step)
            too_large = limit() and limit().problem(width, height)
            found = multiplier_problems(request.multipliers, count, merged=merged)
            found += request_guidance_problems(request)
            folder = config[SessionOptions].prompt_wildcards
            found += wildcard_problems(request, folder) if folder else []
            found += self.request_problems(config, request)
            return [*found, too_large] if too_large else found

        return LineReader(self.line_options, self.size_step, problems)

    def make_picture(self, maker: PictureMaker[Request], config: Config, request: Request, index: int) -> Path:
        """Make and write one picture, or all frames of a clip: `{YYYYmmdd_HHMMSS}_{seed}_{index}.png`."""
        asked, request = request, self.completed(request, maker)
        latents = maker.generate(request)
        texts = self.request_texts(config, asked, request)
        path = unused_path(
            config[self.pictures].output_dir, request.seed, index, config[SessionOptions].picture_ending
        )
        return self.write(maker, config, latents, path, texts)

    def write(
        self, maker: PictureMaker[Request], config: Config, latents: Tensor, path: Path, texts: Mapping[str, str]
    ) -> Path:
        return write_picture(maker.decode(latents), path, texts, config[SessionOptions].image_quality)

    # -- what files tell -----------------------------------------------------------------------------------------------

    @property
    def script_file(self) -> str:
        """Name of the script, by which files tell who has made them."""
        return record_of(self.family).pictures or self.family

    @property
    def variant_options(self) -> list[str]:
        """Options that choose among this family and its variants."""
        return sorted({record.variant_of[1] for record in records().values() if record.variant_of})

    def request_texts(self, config: Config, asked: Request, made: Request) -> dict[str, str]:
        """Text entries of a file: the settings of a request as `made`, and all that makes it again from how it was
        `asked` for."""
        if config[SessionOptions].no_metadata:
            return {}
        more = {entry: getattr(made, field) for entry, field in self.texts.items()}
        return {**picture_texts(made, **more), ENTRY: self.recorded(config, asked, made).text}

    def recorded(self, config: Config, asked: Request, made: Request) -> RecordedSettings:
        """The options of the run, changed by what the prompt line says, with the seed that was taken."""
        base, options = self.base_request(config), shaping_options(config, self.variant_options)
        letters = (letter.field for letter in self.line_options.values() if not letter.ignored)
        fields = {"prompt", *prompts_of(asked), *letters} - {"seed"}
        changed = {name: getattr(asked, name) for name in fields if getattr(asked, name) != getattr(base, name)}
        beside = {name: getattr(asked, name) for field, name in self.recorded_with.items() if field in changed}
        options |= self.as_options({**changed, **beside, "seed": made.seed}, asked)
        line = {name: value for name, value in changed.items() if self._option_of(name) is None}
        given = {name: value for name, value in options.items() if value is not None}
        settings = RecordedSettings(self.script_file, given, line)
        return settings.without_folders() if config[SessionOptions].metadata_file_names else settings

    def _option_of(self, field: str) -> str | None:
        """The option that says a field of the request, where there is one."""
        is_size = self.size_option is not None and field in ("width", "height")
        name = self.size_option if is_size else self.option_names.get(field, field)
        return name if any(name in option_fields(group) for group in self.groups) else None

    def as_options(self, fields: Mapping[str, Any], request: Request | None = None) -> dict[str, Any]:
        """Options that say fields of a request, as far as there are such. `request`: what has the other side of a size,
        where only one is among the fields."""
        found = {}
        for field, value in fields.items():
            option = self._option_of(field)
            if option is not None and option == self.size_option:
                found[option] = [fields.get(side, getattr(request, side, None)) for side in ("height", "width")]
            elif option is not None:
                found[option] = list(value) if isinstance(value, tuple) else value
        return found

    def with_recorded(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values of options with those of --from_metadata below them. ConfigError."""
        from library.generation.recorded_files import option_values

        path = values.get("from_metadata")
        return option_values(self.settings_of(path), self.groups, values, path) if path else values

    def settings_of(self, path: str) -> RecordedSettings:
        """Of the file of --from_metadata."""
        from library.generation.recorded_files import settings_of_file

        return settings_of_file(path, self.script_file, self.as_options)

    def first_request(self, config: Config) -> Request:
        """`base_request`, with what a prompt line has said of the picture of --from_metadata."""
        base, path = self.base_request(config), config[SessionOptions].from_metadata
        if not path:
            return base
        settings = self.settings_of(path)
        logger.info("settings of %s: %s", path, settings.command)
        unknown = sorted(set(settings.line) - {letter.field for letter in self.line_options.values()})
        if unknown:
            raise ConfigError(
                f"--from_metadata is {path}, whose prompt line has {', '.join(unknown)}; this script has no such"
                " settings"
            )
        line = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.line.items()}
        return dataclasses.replace(base, **line)
