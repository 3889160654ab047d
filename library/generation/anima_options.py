"""What the image script of Anima is asked: option groups, the request of a picture, letters of prompt lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import ConfigError, problems_of
from library.core.options import (
    LARGEST_PICTURE_SIDE,
    LARGEST_SEED,
    LARGEST_STEPS,
    LARGEST_TOKENS,
    equivalent_option,
    option,
)
from library.core.plugins import PluginOptions
from library.generation.adapter_files import ListedAdapterOptions
from library.generation.requests import (
    COMMON_LINE_OPTIONS,
    DTYPE_NAMES,
    OUTPUT_TYPES,
    SampledRequest,
    SessionOptions,
    dtype_problem,
    guidance_letters,
    too_small_problems,
)
from library.training.inference_samplers import FLOW_SAMPLER_NAMES, SAMPLER_HELP, check_flow_sampler
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import DRAWN, LineOption, read_shift

SIZE_STEP = 16
TOKEN_LENGTH = 512
_ATTENTION = "attention is always computed by torch's scaled_dot_product_attention"


@dataclass(frozen=True, kw_only=True)
class AnimaModelOptions:
    """Models"""

    dit: str | None = option(None, help="file of the Anima denoiser")
    vae: str | None = option(None, help="file of the autoencoder (qwen_image_vae.safetensors)")
    text_encoder: str | None = option(None, help="file or folder of the Qwen3-0.6B text encoder")
    llm_adapter_path: str | None = option(None, help="file whose LLM adapter replaces that of the model")
    qwen3_tokenizer: str | None = option(None, help="folder of the Qwen3 tokenizer")
    t5_tokenizer_path: str | None = option(None, help="folder or spiece.model file of the T5 tokenizer")
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that no network is needed"
    )
    qwen3_max_token_length: int = option(TOKEN_LENGTH, help="longest prompt in Qwen3 tokens", most=LARGEST_TOKENS)
    t5_max_token_length: int = option(
        TOKEN_LENGTH, help="longest prompt in T5 tokens; also the length of the denoiser's context", most=LARGEST_TOKENS
    )
    dtype: str = option("bfloat16", help=f"number format of all parts: {', '.join(DTYPE_NAMES)}")
    fp8: bool = option(False, help="keep the large matrices of the denoiser in 8 bits, as they are")
    fp8_scaled: bool = option(
        False,
        help="keep the large matrices of the denoiser in 8 bits, each row scaled to the whole range; closer than --fp8",
    )
    text_encoder_cpu: bool = option(False, help="let the text encoder compute on the CPU")
    device: str | None = option(
        None, help="device of the denoiser, e.g. cuda:1; the first GPU when not given, else the CPU"
    )
    attn_mode: str = equivalent_option(
        "torch", help="which package computes the attention",
        choices=("flash", "torch", "sageattn", "xformers", "sdpa"),
        reason=f"--attn_mode: {_ATTENTION}",
    )  # fmt: skip
    vae_chunk_size: int | None = option(
        None, help="rows that the VAE computes at once, an even number: less memory, equal results"
    )
    vae_disable_cache: bool = equivalent_option(
        False, help="no feature cache in the VAE",
        reason="--vae_disable_cache: a single image has no earlier frames, so there is nothing that would be kept",
    )  # fmt: skip

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("qwen3_max_token_length", 1), ("t5_max_token_length", 1))
        unknown = dtype_problem("dtype", self.dtype)
        if unknown:
            problems.append(unknown)
        elif self.dtype_name.startswith("float8"):
            problems.append(f"--dtype is {self.dtype}; 8 bits are for the denoiser only: --fp8 or --fp8_scaled")
        if self.vae_chunk_size is not None and (self.vae_chunk_size < 2 or self.vae_chunk_size % 2):
            problems.append(f"--vae_chunk_size is {self.vae_chunk_size}; needed: an even number of 2 or more, e.g. 64")
        if problems:
            raise ConfigError(problems)

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype.lower()]


@dataclass(frozen=True, kw_only=True)
class AnimaPromptOptions:
    """Pictures"""

    prompt: str | None = option(None, help="what the picture shows")
    negative_prompt: str = option("", help="what it should not show")
    image_size: tuple[int, ...] = option(
        (1024, 1024),
        nargs=2,
        metavar="PIXELS",
        help="height and width, rounded down to multiples of 16",
        most=LARGEST_PICTURE_SIDE,
    )
    infer_steps: int = option(50, help="steps", most=LARGEST_STEPS)
    guidance_scale: float = option(3.5, help="classifier-free guidance; 1 = off, else two forwards per step")
    flow_shift: float = option(5.0, help="how far the steps lie towards noise; 1 = evenly spaced")
    sampler: str = option("euler", help="how a step is made: " + ", ".join(FLOW_SAMPLER_NAMES) + SAMPLER_HELP)
    seed: int | None = option(
        None, help="number that fixes the picture; a drawn one is shown when not given, or with -1", most=LARGEST_SEED
    )
    save_path: str | None = option(None, help="folder of the pictures; made when missing")
    output_type: str = option(
        "images", choices=OUTPUT_TYPES, help="what is written: pictures, latents (safetensors), or both"
    )
    latent_path: list[str] | None = option(None, nargs="*", help="decode these latents instead of making new ones")

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("infer_steps", 1), ("seed", DRAWN))
        problems += problems_of(lambda: check_flow_sampler(self.sampler, "--sampler"))
        if len(self.image_size) != 2 or min(self.image_size) < SIZE_STEP:
            problems.append(
                f"--image_size is {' '.join(map(str, self.image_size))}; needed: height and width, {SIZE_STEP} or more each"
            )
        if not self.flow_shift > 0:
            problems.append(f"--flow_shift is {self.flow_shift}; needed: a number above 0")
        if self.latent_path and self.output_type != "images":
            problems.append(
                f"--output_type is {self.output_type} and --latent_path gives latents already; use --output_type images"
            )
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

    @property
    def output_dir(self) -> str | None:
        return self.save_path


GROUPS = (PluginOptions, AnimaModelOptions, ListedAdapterOptions, AnimaPromptOptions, SessionOptions, ConsoleOptions)


@dataclass(frozen=True, kw_only=True)
class AnimaRequest(SampledRequest):
    """A picture of Anima."""

    flow_shift: float


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    **guidance_letters(),
    "fs": LineOption("flow_shift", read_shift),
}
