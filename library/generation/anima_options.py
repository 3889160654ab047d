"""What the image script of Anima is asked: option groups, the request of a picture, letters of prompt lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import ConfigError, problems_of
from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_TOKENS, equivalent_option, option
from library.core.plugins import PluginOptions
from library.generation.adapter_files import ListedAdapterOptions
from library.generation.guidance_options import GUIDANCE_LINES, GuidanceOptions
from library.generation.latent_options import DitOptions, LatentPictureOptions
from library.generation.preview_options import PreviewOptions
from library.generation.requests import (
    COMMON_LINE_OPTIONS,
    SampledRequest,
    SessionOptions,
    guidance_letters,
    too_small_problems,
)
from library.generation.speed_options import SpeedOptions
from library.generation.step_options import STEP_LINES, StepOptions
from library.training.inference_samplers import FLOW_SAMPLER_NAMES, SAMPLER_HELP, check_flow_sampler
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import LineOption, read_shift

SIZE_STEP = 16
TOKEN_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class AnimaModelOptions(DitOptions):
    """Models"""

    dit: str | None = option(None, help="file of the Anima denoiser")
    vae: str | None = option(None, help="file of the autoencoder (qwen_image_vae.safetensors)")
    text_encoder: str | None = option(None, help="file or folder of the Qwen3-0.6B text encoder")
    llm_adapter_path: str | None = option(None, help="file whose LLM adapter replaces that of the model")
    qwen3_tokenizer: str | None = option(None, help="folder of the Qwen3 tokenizer")
    t5_tokenizer_path: str | None = option(None, help="folder or spiece.model file of the T5 tokenizer")
    qwen3_max_token_length: int = option(TOKEN_LENGTH, help="longest prompt in Qwen3 tokens", most=LARGEST_TOKENS)
    t5_max_token_length: int = option(
        TOKEN_LENGTH, help="longest prompt in T5 tokens; also the length of the denoiser's context", most=LARGEST_TOKENS
    )
    vae_chunk_size: int | None = option(
        None, help="rows that the VAE computes at once, an even number: less memory, equal results"
    )
    vae_disable_cache: bool = equivalent_option(
        False, help="no feature cache in the VAE",
        reason="--vae_disable_cache: a single image has no earlier frames, so there is nothing that would be kept",
    )  # fmt: skip

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("qwen3_max_token_length", 1), ("t5_max_token_length", 1))
        problems += self.format_problems()
        if self.vae_chunk_size is not None and (self.vae_chunk_size < 2 or self.vae_chunk_size % 2):
            problems.append(f"--vae_chunk_size is {self.vae_chunk_size}; needed: an even number of 2 or more, e.g. 64")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class AnimaPromptOptions(LatentPictureOptions):
    """Pictures"""

    size_step = SIZE_STEP
    image_size: tuple[int, ...] = option(
        (1024, 1024), nargs=2, metavar="PIXELS", help=f"height and width, rounded down to multiples of {SIZE_STEP}",
        most=LARGEST_PICTURE_SIDE,
    )  # fmt: skip
    sampler: str = option("euler", help="how a step is made: " + ", ".join(FLOW_SAMPLER_NAMES) + SAMPLER_HELP)

    def __post_init__(self) -> None:
        problems = [
            *self.picture_problems(), *problems_of(lambda: check_flow_sampler(self.sampler, "--sampler")),
        ]  # fmt: skip
        if problems:
            raise ConfigError(problems)

    @property
    def request(self) -> AnimaRequest:
        height, width = self.image_size
        return AnimaRequest(
            prompt=self.prompt or "", negative_prompt=self.negative_prompt, width=width, height=height,
            steps=self.infer_steps,
            seed=self.seed, cfg_scale=self.guidance_scale, flow_shift=self.flow_shift, sampler=self.sampler,
        )  # fmt: skip


GROUPS = (
    PluginOptions, AnimaModelOptions, SpeedOptions, ListedAdapterOptions, AnimaPromptOptions, StepOptions,
    GuidanceOptions, PreviewOptions, SessionOptions, ConsoleOptions,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnimaRequest(SampledRequest):
    """A picture of Anima."""

    flow_shift: float


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    **GUIDANCE_LINES,
    **STEP_LINES,
    **guidance_letters(),
    "fs": LineOption("flow_shift", read_shift),
}
