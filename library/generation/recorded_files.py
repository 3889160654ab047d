"""Texts of made files (pictures, videos, latents), and the settings in them as values of options."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.core.errors import AtelierError, ConfigError, Problems
from library.core.options import converter_of, option_fields, shortened
from library.generation.foreign_texts import fields_of_other_program, is_graph
from library.generation.recorded_requests import CODE_OPTIONS, ENTRY, RecordedSettings

SPELLINGS: Mapping[str, str] = {
    "prompt": "prompt", "negative-prompt": "negative_prompt", "negative_prompt": "negative_prompt", "seed": "seed",
    "seeds": "seed", "steps": "steps", "infer_steps": "steps", "scale": "cfg_scale", "guidance_scale": "cfg_scale",
    "flow-shift": "flow_shift", "flow_shift": "flow_shift", "guidance": "guidance", "sampler": "sampler",
    "embedded_cfg_scale": "embedded_guidance_scale", "video_length": "frames", "frames": "frames", "fps": "fps",
    "width": "width", "height": "height",
}  # fmt: skip
"""entries of files without ENTRY, from training samples and other programs -> fields of requests"""
PREFIX = "bt_"
"""of the entries of another program's files"""
PROMPT_SOURCES = ("from_file", "from_module", "interactive")
"""options that give prompts in the place of the recorded one"""


# -- reading -----------------------------------------------------------------------------------------------------------


def read_file_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The entries of a picture (PNG, WebP, JPEG), a video or a safetensors file. ConfigError for a file that is none,
    or cannot be read."""
    from library.dataset.clips.video_files import VIDEO_EXTENSIONS

    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"{path} is a folder; needed: a file")
    if not file.is_file():
        raise ConfigError(f"{path}: there is no such file")
    if file.suffix.lower() in VIDEO_EXTENSIONS:
        from library.generation.video_files import read_video_texts

        return read_video_texts(file)
    if file.suffix.lower() == ".safetensors":
        from library.checkpoints.safetensors_header import read_header

        return dict(read_header(file)[1])
    from library.dataset.media_utils import image_size
    from library.generation.picture_files import read_texts

    image_size(str(file))
    return read_texts(file)


def size_of(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Width and height of a picture; None of other files."""
    from library.dataset.media_utils import image_extensions, image_size

    return image_size(str(path)) if Path(path).suffix.lower() in image_extensions() else None


def told_fields(texts: Mapping[str, str]) -> dict[str, str]:
    """Fields of requests in the entries of a file without ENTRY, by the names of SPELLINGS or in the one text of
    another program."""
    plain = {name.lower().removeprefix(PREFIX): text for name, text in texts.items()}
    return {SPELLINGS[name]: text for name, text in plain.items() if name in SPELLINGS} or fields_of_other_program(plain)


def settings_of_file(
    path: str, script: str, as_options: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> RecordedSettings:
    """The settings that a file tells. Of one without ENTRY those that are known by their names; `as_options` makes
    options of the script of fields of requests. ConfigError for a file that tells none, or those of another script."""
    try:
        texts = read_file_texts(path)
    except AtelierError as error:
        raise ConfigError(f"--from_metadata: {error}") from error
    if ENTRY in texts:
        settings = RecordedSettings.of_text(texts[ENTRY], str(path))
        if settings.script != script:
            raise ConfigError(
                f"--from_metadata is {path}, which {settings.script} has made; needed: a file of {script}"
            )
        return settings
    fields: dict[str, Any] = dict(told_fields(texts))
    if is_graph(fields.get("prompt", "")):
        raise ConfigError(
            f"--from_metadata is {path}, a picture of ComfyUI, whose graph does not say which of its texts is the prompt;"
            " give prompt and settings on the command line (tools/metaview.py shows the graph)"
        )
    if "prompt" not in fields:
        raise ConfigError(
            f"--from_metadata is {path}; it tells no settings, it may have been written with --no_metadata"
        )
    size = size_of(path)
    if size is not None:
        fields["width"], fields["height"] = size
    return RecordedSettings(script, as_options(fields))


# -- values of options -------------------------------------------------------------------------------------------------


def option_values(
    settings: RecordedSettings, classes: Sequence[type], given: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """Values by option: those that were `given`, and for the others the recorded ones. ConfigError for recorded options
    that the script does not have or take, and for those that run code and are not given."""
    owners = {name: group for group in classes for name in option_fields(group)}
    problems, found = Problems(), {}
    where = f"--from_metadata: {path}"
    for name, value in settings.options.items():
        if name in given or (name == "prompt" and any(given.get(source) for source in PROMPT_SOURCES)):
            continue
        if name not in owners:
            problems.add(f"{where} has --{name}, which this script does not have; another version has written it")
        elif name in CODE_OPTIONS and not _is_own_module(value):
            problems.add(
                f"{where} was made with --{name} {_shown(value)}, which {CODE_OPTIONS[name]}; give it on the command"
                " line too if you trust it"
            )
        else:
            found[name] = problems.attempt(lambda: _converted(owners[name], name, value, where))
    problems.raise_if_any()
    return {**found, **given}


def _is_own_module(value: Any) -> bool:
    """Whether modules are those of the project, as `lora` and `networks.lora`."""
    from library.training.adapters import NETWORKS

    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    return all(name in NETWORKS or re.fullmatch(r"networks\.\w+", name) for name in names)


def _shown(value: Any) -> str:
    return shortened(" ".join(map(str, value)) if isinstance(value, list) else value)


def _converted(owner: type, name: str, value: Any, where: str) -> Any:
    spec, convert = option_fields(owner)[name][1], converter_of(owner, name)
    is_list = spec.nargs is not None

    def one(part: Any) -> Any:
        if not isinstance(part, (str, int, float)):
            raise ValueError(f"a {type(part).__name__}")
        read = convert(part if isinstance(part, str) else str(part))
        if spec.choices and read not in spec.choices:
            raise ValueError(f"known: {', '.join(map(str, spec.choices))}")
        return read

    try:
        if is_list != isinstance(value, list) or (isinstance(spec.nargs, int) and len(value) != spec.nargs):
            raise ValueError("of another number of values")
        return [one(part) for part in value] if is_list else one(value)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"{where} has --{name} {_shown(value)}, which cannot be used: {error}") from None
