"""Sample prompts: prompt files and lines -> SamplePrompt records, when samples are due, and the names of their files.

    a cat on a sofa --w 768 --h 512 --d 42 --s 28 --l 4.0 --n blurry

The text before the first ` --` with a letter behind it is the prompt, whatever it says. Unknown options and values of
the wrong kind are errors that name the file, the line and the option; all of a file are reported together.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from library.core.console import storable
from library.core.errors import ConfigError, Problems, did_you_mean
from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_STEPS, LARGEST_WHOLE, number_problem
from library.core.text_files import parse_json, parse_toml
from library.core.text_files import read_text as read_text_file
from library.core.text_seeds import seed_of
from library.families.record import SampleDefaults
from library.families.registry import by_family

logger = logging.getLogger(__name__)

MIN_STEPS, MAX_STEPS = 1, 1000
LARGEST_SEED = 2**63 - 1
MOST_FRAMES = 10_000
MOST_DIGITS = 30
DRAWN = -1
"""a seed that asks for a drawn one"""
Line, Result = TypeVar("Line"), TypeVar("Result")
SUFFIXES = (".txt", ".toml", ".json")
FLOAT_PATTERN = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """One sample to make. None = not given; a family fills it with its default. `enum` is the place in the file."""

    prompt: str
    enum: int | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    sample_steps: int | None = None
    scale: float | None = None
    """CFG scale of image families"""
    guidance_scale: float | None = None
    """embedded guidance"""
    sample_sampler: str | None = None
    sigma_table: str | None = None
    """noise levels of the steps, of families whose --sample_sigma_table says which"""
    controlnet_image: str | None = None
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None
    flow_shift: float | None = None
    frame_count: int | None = None
    cfg_scale: float | None = None
    """CFG scale of video families"""
    cfg_scale_high_noise: float | None = None
    """the same of a second model, where one takes over from some noise level on"""
    discrete_flow_shift: float | None = None
    image_path: str | None = None
    end_image_path: str | None = None
    control_image_path: tuple[str, ...] | None = None
    control_video_path: str | None = None
    one_frame: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The settings that are given, with plain values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


@dataclass(frozen=True)
class Whole:
    """Reads a whole number from `least` to `most`."""

    least: int = 0
    most: int = LARGEST_WHOLE
    example: int = 512

    def __call__(self, text: str) -> int:
        if not re.fullmatch(r"[0-9]+", text):
            raise ValueError(f"a whole number, {self.least} or more, is needed, e.g. {self.example}")
        return self.checked(int(text) if len(text) <= MOST_DIGITS else self.most + 1)

    def checked(self, value: int) -> int:
        if value < self.least:
            raise ValueError(f"{self.least} or more is needed")
        if value > self.most:
            raise ValueError(f"at most {self.most} is possible")
        return value


class Seed(Whole):
    """-1 stands for a seed that is drawn, as when none is given; a text that is no number is one too (`seed_of`)."""

    def __call__(self, text: str) -> int | None:
        if text == str(DRAWN):
            return None
        return super().__call__(text if re.fullmatch(r"[0-9]+", text) else str(seed_of(text)))

    def checked(self, value: int) -> int | None:
        return None if value == DRAWN else super().checked(value)


read_whole = Whole()
read_picture_side = Whole(1, LARGEST_PICTURE_SIDE)
read_steps = Whole(0, LARGEST_STEPS, 28)
read_seed = Seed(0, LARGEST_SEED, 42)


@dataclass(frozen=True)
class Number:
    """Reads a number from `least`, or from above `above`, to `most`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def __call__(self, text: str) -> float:
        if not FLOAT_PATTERN.fullmatch(text):
            raise ValueError("a number is needed, e.g. 3.5")
        return self.checked(float(text))

    def checked(self, value: float) -> float:
        needed = number_problem(value, is_whole=False, most=self.most, least=self.least)
        if needed is None and self.above is not None and value <= self.above:
            needed = f"a number above {self.above:g}"
        if needed is not None:
            raise ValueError(f"{needed} is needed")
        return float(value)


read_number = Number()
read_share = Number(0, 1)
read_not_negative = Number(0)
read_shift = Number(above=0)


def read_text(text: str) -> str:
    return text


@dataclass(frozen=True)
class LineOption:
    """An option of a prompt line: the field it fills and how its text is read."""

    field: str
    convert: Callable[[str], Any]
    repeats: bool = False
    ignored: str = ""
    """why it changes nothing, where it is read for the sake of lines that others know"""


_SHARED_LINE_OPTIONS = {
    "w": LineOption("width", read_picture_side), "h": LineOption("height", read_picture_side),
    "d": LineOption("seed", read_seed),
    "s": LineOption("sample_steps", read_whole), "g": LineOption("guidance_scale", read_not_negative),
    "n": LineOption("negative_prompt", read_text), "ss": LineOption("sample_sampler", read_text),
    "sg": LineOption("sigma_table", read_text),
}
IMAGE_LINE_OPTIONS: Mapping[str, LineOption] = {
    **_SHARED_LINE_OPTIONS,
    "l": LineOption("scale", read_number),
    "cn": LineOption("controlnet_image", read_text),
    "ctr": LineOption("cfg_trunc_ratio", read_share), "rcfg": LineOption("renorm_cfg", read_not_negative),
    "fs": LineOption("flow_shift", read_shift),
}
VIDEO_LINE_OPTIONS: Mapping[str, LineOption] = {
    **_SHARED_LINE_OPTIONS,
    "f": LineOption("frame_count", Whole(1, MOST_FRAMES, 25)), "fs": LineOption("discrete_flow_shift", read_shift),
    "l": LineOption("cfg_scale", read_number),
    "i": LineOption("image_path", read_text), "ei": LineOption("end_image_path", read_text),
    "cn": LineOption("control_video_path", read_text),
    "ci": LineOption("control_image_path", read_text, repeats=True), "of": LineOption("one_frame", read_text),
}


def parse_line(
    line: str, where: str = "prompt", options: Mapping[str, LineOption] = IMAGE_LINE_OPTIONS, enum: int | None = None
) -> SamplePrompt:
    """One prompt line. `where` names its place in messages. Raises ConfigError with every problem of the line."""
    prompt, values = parse_pieces(line, where, options)
    return SamplePrompt(prompt=prompt, enum=enum, **values)


def parse_pieces(line: str, where: str, options: Mapping[str, LineOption]) -> tuple[str, dict[str, Any]]:
    """The text of a prompt line and the values of its options by field; for records of other scripts too.

    Raises ConfigError with every problem of the line.
    """
    prompt, *pieces = re.split(r"\s--(?=[A-Za-z])", line.strip())
    problems, values = Problems(), {}
    for piece in pieces:
        name, text = [*piece.split(None, 1), ""][:2]
        text = text.strip()
        entry = options.get(name.lower())
        if entry is None:
            known = ", ".join(f"--{option}" for option in options)
            problems.add(
                f"{where}: unknown option --{name}; known: {known}. Dashes in a text stand with a blank behind them"
            )
            continue
        if not text:
            problems.add(f"{where}: --{name} has no value")
            continue
        try:
            value = _checked(entry.field, entry.convert(text))
        except ValueError as error:
            problems.add(f"{where}: --{name} is '{text}'; {error}")
            continue
        if entry.ignored:
            logger.warning("%s: --%s has no effect: %s", where, name, entry.ignored)
            continue
        values[entry.field] = (*values.get(entry.field, ()), value) if entry.repeats else value
    problems.raise_if_any()
    texts = {name: storable(text) for name, text in values.items() if name.endswith("prompt") and isinstance(text, str)}
    return storable(prompt.strip()), {**values, **texts}


def good_lines(lines: Iterable[Line], read: Callable[[Line], Result]) -> list[Result]:
    """What `read` makes of lines. Those that it refuses are told and left out, so that one bad line does not end a run
    of many; ConfigError with every problem where none is right."""
    problems, found = Problems(), []
    for line in lines:
        count = len(problems.messages)
        result = problems.attempt(lambda: read(line))
        if len(problems.messages) == count:
            found.append(result)
    if not found:
        problems.raise_if_any()
    for problem in problems.messages:
        logger.warning("%s; this line is left out", problem)
    return found


def _checked(field: str, value: Any) -> Any:
    """Range of a value; sample_steps is brought into its range."""
    if field == "sample_steps":
        return min(max(value, MIN_STEPS), MAX_STEPS)
    if field == "sample_sampler":
        from library.training.inference_samplers import INFERENCE_SAMPLERS, SAMPLER_NAMES

        if INFERENCE_SAMPLERS.problem(value) is not None:
            raise ValueError(f"unknown sampler{did_you_mean(value, SAMPLER_NAMES) or '.'} Known: {', '.join(SAMPLER_NAMES)}")
    return value


def load_prompts(
    path: str | Path, options: Mapping[str, LineOption] = IMAGE_LINE_OPTIONS, left_out: list[str] | None = None
) -> list[SamplePrompt]:
    """All prompts of a .txt, .toml or .json file, numbered in order. ConfigError with every problem of the file; with a
    list `left_out`, problems of single prompts are put into it, as long as one prompt is good."""
    path = Path(path)
    readers = {".txt": _read_txt, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"--sample_prompts is {path}; the file has to end in {', '.join(SUFFIXES)}")
    content = read_text_file(path, f"--sample_prompts is {path}, which")
    entries = readers[path.suffix.lower()](path.name, content)
    problems, prompts = Problems(), []
    for where, entry in entries:
        try:
            prompts.append(_prompt_of(where, entry, options, len(prompts)))
        except ConfigError as error:
            problems.absorb(error)
    if left_out is None or not prompts:
        problems.raise_if_any()
    if not prompts:
        raise ConfigError(f"--sample_prompts is {path}; there is no prompt in the file")
    if left_out is not None:
        left_out += problems.messages
    return prompts


def holds_no_prompt(path: str | Path | None) -> bool:
    """Whether a file is there and has nothing but blanks and comments, as front ends write it when no prompt was
    given."""
    if path is None or not Path(path).is_file():
        return False
    try:
        content = read_text_file(path)
    except ConfigError:
        return False  # told by load_prompts
    return not content.strip() or (Path(path).suffix.lower() == ".txt" and not _read_txt("", content))


def _read_txt(name: str, content: str) -> list[tuple[str, Any]]:
    """One prompt per line; empty lines and lines whose first character is # are left out."""
    lines = enumerate(content.split("\n"), start=1)
    return [(f"{name} line {number}", line) for number, line in lines if line.strip() and not line.startswith("#")]


def _read_toml(name: str, content: str) -> list[tuple[str, Any]]:
    """[prompt] with keys for all, and [[prompt.subset]], whose keys win."""
    document = parse_toml(content, name)
    others = sorted(set(document) - {"prompt"})
    table = document.get("prompt")
    if others or not isinstance(table, dict):
        raise ConfigError(
            f"{name} has {', '.join(others) or 'no [prompt] table'}; needed: [prompt] with settings for all prompts "
            "and one"
            " [[prompt.subset]] per prompt"
        )
    common = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}] if "prompt" in common else [])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise ConfigError(f"{name}: prompt.subset is not a list of tables; write [[prompt.subset]]")
    return [(f"{name} prompt.subset[{i}]", {**common, **subset}) for i, subset in enumerate(subsets)]


def _read_json(name: str, content: str) -> list[tuple[str, Any]]:
    """A list of lines and objects."""
    document = parse_json(content, name)
    if not isinstance(document, list):
        raise ConfigError(f"{name} holds {type(document).__name__}; a list of texts and objects is needed")
    return [
        (f"{name} entry {i} ({'first' if i == 1 else 'counted from 1'})", entry)
        for i, entry in enumerate(document, start=1)
    ]


def _prompt_of(where: str, entry: Any, options: Mapping[str, LineOption], enum: int) -> SamplePrompt:
    if isinstance(entry, str):
        return parse_line(entry, where, options, enum)
    if isinstance(entry, dict):
        return _prompt_of_keys(where, entry, options, enum)
    raise ConfigError(f"{where} is {entry!r}; a text or an object with the key prompt is needed")


def _prompt_of_keys(where: str, entry: Mapping[str, Any], options: Mapping[str, LineOption], enum: int) -> SamplePrompt:
    by_field = {option.field: option for option in options.values()}
    problems, values = Problems(), {}
    if not isinstance(entry.get("prompt"), str):
        problems.add(f"{where} has no text under the key prompt")
    for key, value in entry.items():
        if key == "prompt" or value is None:
            continue
        if key not in by_field:
            problems.add(
                f"{where}: unknown key {key}{did_you_mean(key, [*by_field, 'prompt']) or '.'} Known: prompt, "
                f"{', '.join(by_field)}"
            )
            continue
        try:
            values[key] = _checked_key(by_field[key], value)
        except ValueError as error:
            problems.add(f"{where}: {key} is {value!r}; {error}")
    problems.raise_if_any()
    return SamplePrompt(prompt=entry["prompt"], enum=enum, **values)


def _checked_key(option: LineOption, value: Any) -> Any:
    """A value of a TOML or JSON key; types are not converted, but a whole number may stand for a fraction."""
    if option.repeats:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError("a text or a list of texts is needed")
        return tuple(items)
    if option.convert is read_text:
        if not isinstance(value, str):
            raise ValueError("a text is needed")
        return _checked(option.field, value)
    is_whole = isinstance(option.convert, Whole)
    kinds = (int,) if is_whole else (int, float)
    if (
        isinstance(value, bool)
        or not isinstance(value, kinds)
        or (is_whole and value < 0 and not isinstance(option.convert, Seed))
    ):
        raise ValueError("a whole number, 0 or more, is needed" if is_whole else "a number is needed")
    number = option.convert if isinstance(option.convert, (Whole, Number)) else read_number
    return _checked(option.field, number.checked(value))


SAMPLE_DEFAULTS: Mapping[str, SampleDefaults] = by_family(lambda record: record.samples)


def with_defaults(prompt: SamplePrompt, defaults: SampleDefaults) -> SamplePrompt:
    """A complete prompt for a family; sides are rounded down. An explicit 0 stays."""
    values = {key: value for key, value in defaults.settings.items() if getattr(prompt, key) is None}
    for side in ("width", "height"):
        pixels = defaults.size if getattr(prompt, side) is None else getattr(prompt, side)
        values[side] = pixels // defaults.size_step * defaults.size_step
        if values[side] < 1:
            raise ConfigError(
                f"the sample prompt '{prompt.prompt}' has {side} {pixels}; at least {defaults.size_step} is needed"
            )
    return dataclasses.replace(prompt, **values)


def unused_settings(
    prompts: Sequence[SamplePrompt], defaults: SampleDefaults, more: Collection[str] = ()
) -> list[str]:
    """Settings that prompts give and neither a family reads nor who reads `more`, for one warning at start."""
    used = {"prompt", "enum", "negative_prompt", "width", "height", "seed", *defaults.settings, *defaults.reads, *more}
    return sorted({key for prompt in prompts for key in prompt.to_dict()} - used)


def is_sample_due(options: Any, at: str, step: int, epoch: int) -> bool:
    """Whether samples are due `at` "first", after optimizer step `step`, or at the end of `epoch` (from 1).

    `options` is SamplingOptions. Epochs take precedence: with an interval of epochs, that of steps does nothing. An
    interval of 0 or less is none.
    """
    if at == "first":
        return bool(options.sample_at_first)
    every_epochs, every_steps = options.sample_every_n_epochs, options.sample_every_n_steps
    if every_epochs and every_epochs > 0:
        return at == "epoch" and epoch % every_epochs == 0
    return at == "step" and bool(every_steps) and every_steps > 0 and step > 0 and step % every_steps == 0


def unreached_interval(options: Any, max_train_steps: int, finished_epochs: int) -> str | None:
    """The option whose interval is longer than the run, so that no samples would be made; None when there are some or
    none are asked for. `options` is SamplingOptions; `finished_epochs`: whole epochs of the run."""
    every_epochs, every_steps = options.sample_every_n_epochs or 0, options.sample_every_n_steps or 0
    if every_epochs > 0:
        return "sample_every_n_epochs" if every_epochs > finished_epochs else None
    return "sample_every_n_steps" if every_steps > max_train_steps else None


def sample_suffix(at: str, number: int) -> str:
    """e000002 for an epoch (and e000000 at first), 000150 for a step."""
    return f"{number:06d}" if at == "step" else f"e{number:06d}"


def sample_file_name(
    output_name: str | None, at: str, number: int, *, enum: int, seed: int | None, timestamp: str,
    extension: str = ".png"
) -> str:
    """Name below output_dir: sample/{output_name_}{suffix}_{enum:02d}_{timestamp}{_seed}.png. `number`: epoch or
    step."""
    parts = [output_name, sample_suffix(at, number), f"{enum:02d}", timestamp, None if seed is None else str(seed)]
    return "sample/" + "_".join(part for part in parts if part is not None) + extension


def replace_words(prompt: SamplePrompt, token: str, words: Sequence[str]) -> SamplePrompt:
    """`token` of a textual inversion becomes the `words` of its vectors, in the negative prompt too."""
    text, negative, pattern = " ".join(words), prompt.negative_prompt, whole_word(token)
    return dataclasses.replace(
        prompt, prompt=pattern.sub(lambda _: text, prompt.prompt),
        negative_prompt=None if negative is None else pattern.sub(lambda _: text, negative)
    )


def whole_word(word: str) -> re.Pattern[str]:
    """Finds a word where it is no part of a longer one."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
