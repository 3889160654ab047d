"""Where prompts come from (option, file, module, keyboard, picture files), and the pictures and masks of img2img."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.core.console import utf8_text
from library.core.errors import ConfigError, Problems
from library.core.text_files import read_text
from library.generation.gen_img.options import GenerationPromptOptions
from library.generation.gen_img.plan import PromptLine
from library.generation.gen_img.prompts import GENERATION_LINE_OPTIONS
from library.training.sampling_prompts import good_lines

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def written_lines(options: GenerationPromptOptions, raw: str | None = None) -> list[PromptLine]:
    """The prompts of --prompt or --from_file. ConfigError when the file cannot be read or has none. `raw`: how the one
    of --prompt was written, where its choices are drawn already."""
    if options.prompt is not None:
        return [PromptLine(options.prompt, "--prompt", raw=raw)]
    if not options.from_file:
        return []
    text = read_text(options.from_file, f"--from_file is {options.from_file}, which")
    lines = [
        PromptLine(line.strip(), f"{options.from_file} line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.startswith("#")
    ]
    if not lines:
        raise ConfigError(f"--from_file is {options.from_file}; there is no prompt in the file")
    return lines


def checked(lines: list[PromptLine], check: Callable[[PromptLine], None]) -> list[PromptLine]:
    """The lines that can be made; the others are told. ConfigError with the problems of all of them where none can."""
    def same(line: PromptLine) -> PromptLine:
        check(line)
        return line

    return good_lines(lines, same)


def typed_lines(check: Callable[[PromptLine], None]) -> Iterator[PromptLine]:
    """What is typed, until an empty line or the end of input. A line that is wrong is told and asked for again."""
    print(
        f"Enter a prompt; options behind it: {' '.join('--' + name for name in GENERATION_LINE_OPTIONS)}; an empty "
        "line ends"
    )
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        try:
            line = PromptLine(utf8_text(text.strip(), "what was typed"), "prompt")
            check(line)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
        else:
            yield line


def load_prompter(path: str) -> Callable[..., Any]:
    """`get_prompter` of a Python file. ConfigError when there is none."""
    if not Path(path).is_file():
        raise ConfigError(f"--from_module is {path}; a Python file is needed, and there is none")
    spec = importlib.util.spec_from_file_location("prompt_module", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_prompter", None)):
        raise ConfigError(f"--from_module is {path}; it has no function get_prompter(options, pipeline, networks)")
    return module.get_prompter


def module_lines(prompter: Any) -> Iterator[PromptLine]:
    """One round of a module's prompts: `prompter` is a function, called until it gives None, or a list of lines."""
    texts = iter(prompter, None) if callable(prompter) else iter(prompter)
    for number, text in enumerate(texts, start=1):
        yield PromptLine(str(text).strip(), f"prompt {number} of --from_module")


def source_files(path: str, option: str) -> list[Path]:
    """A picture, or the pictures of a folder by name. ConfigError when there is none."""
    place = Path(path)
    if place.is_dir():
        found = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise ConfigError(f"--{option} is the folder {path}; it holds no picture ({', '.join(SUFFIXES)})")
        return found
    if not place.is_file():
        raise ConfigError(f"--{option} is {path}; there is no such file or folder")
    return [place]


def open_picture(path: Path, mode: str, option: str) -> Image.Image:
    """The picture in a mode of PIL, RGB or L, read as those of a dataset are: deep and turned ones too.

    ConfigError when it cannot be read."""
    from PIL import Image

    from library.dataset.media_utils import ImageFileError, decode_image

    try:
        return Image.fromarray(decode_image(path)).convert(mode)  # [H, W, 3]
    except ImageFileError as error:
        raise ConfigError(f"--{option}: {error}") from error


def _texts_of(file: Path) -> dict[str, str]:
    """The text entries of a picture file. ConfigError when it cannot be read."""
    from library.dataset.media_utils import opened_image
    from library.generation.picture_files import image_texts

    with opened_image(file) as image:
        return image_texts(image)


def lines_of_pictures(files: list[Path]) -> list[PromptLine]:
    """The prompts that picture files hold, as this script writes them. ConfigError for those without one."""
    problems, lines = Problems(), []
    for number, file in enumerate(files):
        texts = problems.attempt(lambda: _texts_of(file))
        if texts is None:
            continue
        prompt, negative = texts.get("prompt"), texts.get("negative-prompt")
        if prompt is None:
            problems.add(f"there is no prompt, and {file} holds none either; give --prompt")
            continue
        lines.append(PromptLine(finished_line(prompt, negative), str(file), number))
    problems.raise_if_any()
    return lines


def finished_line(prompt: str, negative: str | None) -> str:
    """The line of a finished prompt, in which no choices are left."""
    braces = str.maketrans({"{": "\\{", "}": "\\}"})
    return prompt.translate(braces) + (f" --n {negative.translate(braces)}" if negative else "")
