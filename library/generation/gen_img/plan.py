"""From prompt lines to pictures: what each one takes from its line, from the options and from the model; seeds;
batches."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from library.core.errors import ConfigError
from library.core.keyed_random import key_seed, keyed_random
from library.core.options import Config
from library.generation.gen_img.dynamic_prompts import expand_prompt
from library.generation.gen_img.options import (
    DEFAULT_STRENGTH,
    GenerationNetworkOptions,
    GenerationPictureOptions,
    GenerationPromptOptions,
    GenerationShrinkOptions,
    GenerationSourceOptions,
)
from library.generation.gen_img.prompts import LARGEST_SEED, NO_NEGATIVE_SCALE, GenerationPrompt, parse_generation_line
from library.generation.wildcards import Wildcards
from library.training.sampling_prompts import DRAWN

logger = logging.getLogger(__name__)

SIZE_STEP, SOURCE_SIZE_STEP = 8, 32
_SEED_PIECE = re.compile(r"\s--[dD]\s+([^{}]+?)\s*(?=\s--[A-Za-z]|$)")


@dataclass(frozen=True)
class PromptLine:
    """A prompt with its options as written. `where` names its place in messages; `source`: the picture of --image_path
    that it belongs to, where it came from one; `raw`: the line before its choices were drawn, where `text` is one
    after."""

    text: str
    where: str
    source: int | None = None
    raw: str | None = None


@dataclass(frozen=True)
class DeepShrinkSettings:
    """Blocks before which features are made smaller by `ratio`, and the least timestep of each."""

    depth_1: int
    timesteps_1: int
    depth_2: int | None
    timesteps_2: int
    ratio: float


@dataclass(frozen=True)
class GradualLatentSettings:
    """Latents that begin at `ratio` of their sides and grow by `ratio_step` every `every_n_steps` below `timesteps`."""

    timesteps: int
    ratio: float
    ratio_step: float
    every_n_steps: int
    s_noise: float
    unsharp: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One picture, complete. `number` counts the pictures of the run, from 0; `index` those of the prompt.

    Pictures whose `batch_key` is equal can be made together.
    """

    prompt: str
    negative_prompt: str
    raw_prompt: str
    seed: int
    number: int
    index: int
    file_name: str | None
    width: int
    height: int
    steps: int
    scale: float
    negative_scale: float | None
    strength: float
    first_strength: float
    multipliers: tuple[float, ...]
    sizes: tuple[int, ...]
    """SDXL: original height and width, crop top and left"""
    sizes_negative: tuple[int, ...]
    deep_shrink: DeepShrinkSettings | None
    gradual_latent: GradualLatentSettings | None
    source: int | None = None
    """which picture of --image_path"""
    guide: int | None = None
    """which set of pictures of --guide_image_path"""

    @property
    def batch_key(self) -> ImageRequest:
        return dataclasses.replace(
            self, prompt="", negative_prompt="", raw_prompt="", seed=0, number=0, index=0, file_name=None, source=None,
            guide=None,
        )


def round_of(
    lines: Sequence[PromptLine], options: GenerationPromptOptions, base_seed: int, number: int
) -> list[PromptLine]:
    """The lines of one round, in another order with --shuffle_prompts."""
    found = list(lines)
    if options.shuffle_prompts:
        keyed_random(base_seed, "prompt order", number).shuffle(found)
    return found


class Planner:
    """Makes complete requests. `source_sizes` are (width, height) of the pictures of --image_path; `guide_turns`: how
    many sets of guide pictures there are; `is_alone`: there is one picture in the run, which takes --seed itself."""

    def __init__(
        self, config: Config, *, default_size: int, source_sizes: Sequence[tuple[int, int]] = (), guide_turns: int = 0,
        is_alone: bool = False,
    ) -> None:
        self.prompts = config[GenerationPromptOptions]
        self.pictures = config[GenerationPictureOptions]
        self.sources = config[GenerationSourceOptions]
        self.shrink = config[GenerationShrinkOptions]
        networks = config[GenerationNetworkOptions]
        self.multipliers = tuple(networks.network_mul or [1.0] * len(networks.network_weights or []))
        self.num_merged = networks.num_merged
        self.default_size = default_size
        self.source_sizes = source_sizes
        self.guide_turns = guide_turns
        self.is_alone = is_alone
        given = self.prompts.seed
        self.base_seed = random.SystemRandom().randint(0, LARGEST_SEED) if given in (None, DRAWN) else given
        self.wildcards = Wildcards(self.prompts.prompt_wildcards) if self.prompts.prompt_wildcards else None
        self.number = 0
        self._told: set[str] = set()

    def check(self, line: PromptLine) -> list[ImageRequest]:
        """The first picture of a line, as examples; ConfigError, with its place, for a line that cannot be made."""
        problems = self.wildcards.problems(line.text) if self.wildcards else []
        if problems:
            raise ConfigError([f"{line.where}: {problem}" for problem in problems])
        given = _given_seeds(line)
        return list(self._requests(line, seed=(given[0] or 0) if given else 0, index=0))

    def requests(self, line: PromptLine, round_number: int) -> Iterator[ImageRequest]:
        """The pictures of a line in one round: --images_per_prompt, each with the combinations of `{e$$...}`."""
        for index in range(self.prompts.images_per_prompt):
            yield from self.requests_at(line, round_number, index)

    def requests_at(self, line: PromptLine, round_number: int, index: int) -> Iterator[ImageRequest]:
        """Those of one of the --images_per_prompt. ConfigError when its draw of the choices cannot be made."""
        given = _given_seeds(line)
        seed = given[min(index, len(given) - 1)] if given else None
        if seed is None:
            seed = self._drawn_seed(round_number, index)
        try:
            for request in self._requests(line, seed, index):
                yield request
                self.number += 1
        except ConfigError:
            self.number += 1  # the next picture has a seed of its own
            raise

    def _requests(self, line: PromptLine, seed: int, index: int) -> Iterator[ImageRequest]:
        """One request for each combination, made when it is asked for: its number is that of the picture then."""
        try:
            text = line.text if self.wildcards is None else self.wildcards.expanded(line.text, seed)
            texts = expand_prompt(text, seed)
        except ConfigError as error:
            raise ConfigError([f"{line.where}: {problem}" for problem in error.problems]) from error
        for text in texts:
            yield self._request(parse_generation_line(text, line.where), line, seed, index)

    def _drawn_seed(self, round_number: int, index: int) -> int:
        if self.is_alone:
            return self.base_seed
        key = ("round", round_number, index) if self.prompts.iter_same_seed else (self.number,)
        return key_seed(self.base_seed, "image seed", *key) % (LARGEST_SEED + 1)

    def _source(self, line: PromptLine) -> int | None:
        """The prompt's own picture, or the next one in turn."""
        if line.source is not None:
            return line.source
        return self.number % len(self.source_sizes) if self.source_sizes else None

    def _request(self, prompt: GenerationPrompt, line: PromptLine, seed: int, index: int) -> ImageRequest:
        if prompt.clip_prompt is not None:
            raise ConfigError(
                f"{line.where}: --c is a second prompt for CLIP guidance, which is not there; leave it out"
            )
        width, height = self._size(prompt, line)
        strength = _first(prompt.strength, self.sources.strength, DEFAULT_STRENGTH)
        negative_scale = _first(prompt.negative_scale, self.pictures.negative_scale)
        sizes, sizes_negative = self._sizes(prompt, height, width)
        scale = _first(prompt.scale, self.pictures.scale)
        if scale <= 1 and (prompt.negative_prompt or negative_scale is not None):
            self._tell(f"the scale is {scale:g}, which switches guidance off; negative prompts have no effect")
        return ImageRequest(
            prompt=prompt.prompt, negative_prompt=prompt.negative_prompt or "", raw_prompt=_first(line.raw, line.text), seed=seed,
            number=self.number,
            index=index, file_name=self._file_name(prompt, line), width=width, height=height,
            steps=_first(prompt.sample_steps, self.pictures.steps), scale=scale,
            negative_scale=None if negative_scale == NO_NEGATIVE_SCALE else negative_scale,
            strength=strength, first_strength=_first(self.sources.highres_fix_strength, strength),
            multipliers=self._multipliers(prompt, line), sizes=sizes, sizes_negative=sizes_negative,
            deep_shrink=self._deep_shrink(prompt), gradual_latent=self._gradual_latent(prompt, line),
            source=self._source(line), guide=self.number % self.guide_turns if self.guide_turns else None,
        )  # fmt: skip

    def _size(self, prompt: GenerationPrompt, line: PromptLine) -> tuple[int, int]:
        """(width, height): of the line, of --W and --H, of the source picture (not in highres fix), or the model's."""
        defaults = (self.default_size, self.default_size)
        if self.source_sizes and self.sources.highres_fix_scale is None:
            defaults = tuple(side - side % SOURCE_SIZE_STEP for side in self.source_sizes[self._source(line)])
        asked = (
            _first(prompt.width, self.pictures.W, defaults[0]),
            _first(prompt.height, self.pictures.H, defaults[1]),
        )
        width, height = (side - side % SIZE_STEP for side in asked)
        if min(width, height) < SIZE_STEP:
            raise ConfigError(
                f"the prompt '{prompt.prompt}' has the size {asked[0]}x{asked[1]}; at least {SIZE_STEP}x{SIZE_STEP} is "
                "needed"
            )
        if (width, height) != asked:
            self._tell(f"the size is {asked[0]}x{asked[1]}; made {width}x{height}, a multiple of {SIZE_STEP}")
        return width, height

    def _tell(self, message: str) -> None:
        """A warning, once in a run."""
        if message not in self._told:
            self._told.add(message)
            logger.warning(message)

    def _sizes(self, prompt: GenerationPrompt, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        options = self.pictures
        crop = (_first(prompt.crop_top, options.crop_top, 0), _first(prompt.crop_left, options.crop_left, 0))
        own = (
            _first(prompt.original_height, options.original_height, height),
            _first(prompt.original_width, options.original_width, width),
        )
        negative = (
            _first(prompt.original_height_negative, options.original_height_negative, own[0]),
            _first(prompt.original_width_negative, options.original_width_negative, own[1]),
        )
        return (*own, *crop), (*negative, *crop)

    def _multipliers(self, prompt: GenerationPrompt, line: PromptLine) -> tuple[float, ...]:
        if prompt.network_multipliers is None:
            return self.multipliers
        if not self.multipliers:
            raise ConfigError(f"{line.where}: --am gives multipliers, and there are no networks (--network_weights)")
        try:
            chosen = prompt.multipliers_of(len(self.multipliers), self.multipliers)
        except ConfigError as error:
            raise ConfigError(f"{line.where}: {error}") from error
        if chosen[: self.num_merged] != self.multipliers[: self.num_merged]:
            raise ConfigError(
                f"{line.where}: --am changes a network that is merged into the weights; its multiplier stays"
                f" {', '.join(f'{m:g}' for m in self.multipliers[: self.num_merged])}. Use --network_pre_calc instead "
                "of merging"
            )
        return chosen

    @staticmethod
    def _file_name(prompt: GenerationPrompt, line: PromptLine) -> str | None:
        name = prompt.file_name
        if name is not None and (name.startswith(("/", "\\")) or ":" in name or ".." in re.split(r"[\\/]", name)):
            raise ConfigError(f"{line.where}: --f is '{name}'; a name inside --outdir is needed, e.g. lighthouse.png")
        return name

    def _deep_shrink(self, prompt: GenerationPrompt) -> DeepShrinkSettings | None:
        options = self.shrink
        depth = _first(prompt.deep_shrink_depth_1, options.ds_depth_1)
        if depth is None:
            return None
        return DeepShrinkSettings(
            depth, _first(prompt.deep_shrink_timesteps_1, options.ds_timesteps_1),
            _first(prompt.deep_shrink_depth_2, options.ds_depth_2),
            _first(prompt.deep_shrink_timesteps_2, options.ds_timesteps_2),
            _first(prompt.deep_shrink_ratio, options.ds_ratio),
        )  # fmt: skip

    def _gradual_latent(self, prompt: GenerationPrompt, line: PromptLine) -> GradualLatentSettings | None:
        options = self.shrink
        timesteps = _first(prompt.gradual_latent_timesteps, options.gradual_latent_timesteps)
        if timesteps is None:
            return None
        if self.pictures.sampler.removeprefix("k_") != "euler_a":
            raise ConfigError(
                f"{line.where}: gradual latent works with --sampler euler_a; the sampler is {self.pictures.sampler}"
            )
        return GradualLatentSettings(
            timesteps, _first(prompt.gradual_latent_ratio, options.gradual_latent_ratio),
            _first(prompt.gradual_latent_ratio_step, options.gradual_latent_ratio_step),
            _first(prompt.gradual_latent_every_n_steps, options.gradual_latent_every_n_steps),
            _first(prompt.gradual_latent_s_noise, options.gradual_latent_s_noise),
            _first(prompt.gradual_latent_unsharp, options.unsharp),
        )  # fmt: skip


def _first(*values: Any) -> Any:
    """The first value that is given; a 0 is one."""
    return next((value for value in values if value is not None), None)


def _given_seeds(line: PromptLine) -> tuple[int | None, ...]:
    """The seeds of `--d` on the line, read before the choices of the line are made from them."""
    match = _SEED_PIECE.search(line.text)
    return (parse_generation_line(f"- --d {match[1]}", line.where).seeds or ()) if match else ()


def batches(requests: Iterable[ImageRequest], size: int) -> Iterator[list[ImageRequest]]:
    """Neighbours with an equal `batch_key`, at most `size` together."""
    waiting: list[ImageRequest] = []
    for request in requests:
        if waiting and waiting[0].batch_key != request.batch_key:
            yield waiting
            waiting = []
        waiting.append(request)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def first_stage(request: ImageRequest, scale: float, steps: int) -> ImageRequest:
    """The small picture of highres fix: sides times `scale` rounded down to 32; sizes that were not given follow it.

    ConfigError when a side would be below 32.
    """
    width, height = (
        int(side * scale) // SOURCE_SIZE_STEP * SOURCE_SIZE_STEP for side in (request.width, request.height)
    )
    if min(width, height) < SOURCE_SIZE_STEP:
        raise ConfigError(
            f"--highres_fix_scale is {scale}: pictures of {request.width}x{request.height} would begin at "
            f"{width}x{height};"
            f" at least {SOURCE_SIZE_STEP} is needed"
        )
    full, small = (request.height, request.width), (height, width)

    def follow(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return (*(small if sizes[:2] == full else sizes[:2]), *sizes[2:])

    return dataclasses.replace(
        request, width=width, height=height, steps=steps, strength=request.first_strength, sizes=follow(request.sizes),
        sizes_negative=follow(request.sizes_negative),
    )
