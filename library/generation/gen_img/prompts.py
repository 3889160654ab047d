"""Prompt lines of the generation script for SD models: the text, and the options ` --x value` after it.

    a lighthouse --w 768 --h 512 --d 1,2,3 --s 30 --l 7 --nl none --am 0.8,1

The syntax is that of sample prompts (`library/training/sampling_prompts.py`); the options are this table's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.core.errors import ConfigError, Problems
from library.training.sampling_prompts import (
    LineOption,
    Number,
    Seed,
    Whole,
    parse_pieces,
    read_not_negative,
    read_number,
    read_picture_side,
    read_share,
    read_text,
    read_whole,
)

NO_NEGATIVE_SCALE = "none"
UNSHARP_VALUES = 4
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationPrompt:
    """One prompt line. None = not given: the script's own option holds."""

    prompt: str
    negative_prompt: str | None = None
    clip_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    sample_steps: int | None = None
    seeds: tuple[int | None, ...] | None = None
    """None among them: a drawn one"""
    scale: float | None = None
    negative_scale: float | str | None = None
    """a number, or "none": no third branch even if the script's option asks for one"""
    strength: float | None = None
    network_multipliers: tuple[float, ...] | None = None
    file_name: str | None = None
    deep_shrink_depth_1: int | None = None
    deep_shrink_timesteps_1: int | None = None
    deep_shrink_depth_2: int | None = None
    deep_shrink_timesteps_2: int | None = None
    deep_shrink_ratio: float | None = None
    gradual_latent_timesteps: int | None = None
    gradual_latent_ratio: float | None = None
    gradual_latent_every_n_steps: int | None = None
    gradual_latent_ratio_step: float | None = None
    gradual_latent_s_noise: float | None = None
    gradual_latent_unsharp: tuple[float, ...] | None = None
    """size of the kernel, sigma, strength, and 1 or 0: sharpen the latents or their noise"""

    def seed_of(self, image: int) -> int | None:
        """The seed of image number `image` of this prompt; the last of a list repeats. None when it is to be drawn."""
        return None if self.seeds is None else self.seeds[min(image, len(self.seeds) - 1)]

    def multipliers_of(self, num_networks: int, default: Sequence[float]) -> tuple[float, ...]:
        """One multiplier per network. ConfigError when the line has another number of them."""
        if self.network_multipliers is None:
            return tuple(default)
        if len(self.network_multipliers) != num_networks:
            raise ConfigError(
                f"the prompt '{self.prompt}' has {len(self.network_multipliers)} multipliers (--am) for {num_networks} "
                "networks;"
                " give one per network, e.g. --am " + ",".join(["1"] * num_networks)
            )
        return self.network_multipliers


def _listed(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Reads values with commas between them."""

    def read(text: str) -> tuple[Any, ...]:
        return tuple(convert(part.strip()) for part in text.split(","))

    return read


_AT_LEAST_ONE = Whole(1)
_TIMESTEP = Whole(0, 1000, 650)
_RATIO = Number(above=0, most=1)
_SEED = Seed(0, LARGEST_SEED, 42)


def _scale_or_none(text: str) -> float | str:
    return NO_NEGATIVE_SCALE if text.lower() == NO_NEGATIVE_SCALE else read_number(text)


def _unsharp(text: str) -> tuple[float, ...]:
    values = _listed(read_number)(text)
    is_odd_size = values[0] >= 1 and values[0] % 2 == 1
    if len(values) != UNSHARP_VALUES or not is_odd_size or values[3] not in (0, 1):
        raise ValueError(
            "an odd kernel size, sigma, strength, and 1 (latents) or 0 (noise) are needed, e.g. 3,0.5,0.5,1"
        )
    return values


GENERATION_LINE_OPTIONS: Mapping[str, LineOption] = {
    "w": LineOption("width", read_picture_side), "h": LineOption("height", read_picture_side),
    "s": LineOption("sample_steps", read_whole),
    "d": LineOption("seeds", _listed(_SEED)), "t": LineOption("strength", read_share),
    "n": LineOption("negative_prompt", read_text), "c": LineOption("clip_prompt", read_text),
    "l": LineOption("scale", read_number), "nl": LineOption("negative_scale", _scale_or_none),
    "am": LineOption("network_multipliers", _listed(read_number)), "f": LineOption("file_name", read_text),
    "ow": LineOption("original_width", _AT_LEAST_ONE), "oh": LineOption("original_height", _AT_LEAST_ONE),
    "nw": LineOption("original_width_negative", _AT_LEAST_ONE),
    "nh": LineOption("original_height_negative", _AT_LEAST_ONE),
    "ct": LineOption("crop_top", read_whole), "cl": LineOption("crop_left", read_whole),
    "dsd1": LineOption("deep_shrink_depth_1", read_whole), "dst1": LineOption("deep_shrink_timesteps_1", _TIMESTEP),
    "dsd2": LineOption("deep_shrink_depth_2", read_whole), "dst2": LineOption("deep_shrink_timesteps_2", _TIMESTEP),
    "dsr": LineOption("deep_shrink_ratio", _RATIO),
    "glt": LineOption("gradual_latent_timesteps", _TIMESTEP), "glr": LineOption("gradual_latent_ratio", _RATIO),
    "gle": LineOption("gradual_latent_every_n_steps", _AT_LEAST_ONE),
    "gls": LineOption("gradual_latent_ratio_step", _RATIO),
    "glsn": LineOption("gradual_latent_s_noise", read_not_negative),
    "glus": LineOption("gradual_latent_unsharp", _unsharp),
}


def parse_generation_line(line: str, where: str = "prompt") -> GenerationPrompt:
    """One prompt line. `where` names its place in messages. Raises ConfigError with every problem of the line."""
    prompt, values = parse_pieces(line, where, GENERATION_LINE_OPTIONS)
    return GenerationPrompt(prompt=prompt, **values)


def parse_generation_lines(content: str, name: str) -> list[GenerationPrompt]:
    """All prompts of a text: one per line; empty lines and lines that start with # are left out.

    Raises ConfigError with every problem of the file `name`, each with its line number.
    """
    problems, prompts = Problems(), []
    for line_number, line in enumerate(content.split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            prompts.append(parse_generation_line(line, f"{name} line {line_number}"))
        except ConfigError as error:
            problems.absorb(error)
    problems.raise_if_any()
    return prompts
