"""What the image script of SDXL is asked: option groups, the request of a picture, letters of prompt lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import ConfigError, problems_of
from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_SEED, option
from library.core.plugins import PluginOptions
from library.core.text_seeds import seed_of
from library.generation.adapter_files import AdapterChoice, EmbeddingOptions, parse_adapter_argument
from library.generation.guidance_options import GUIDANCE_LINES, GuidanceOptions
from library.generation.preview_options import PreviewOptions
from library.generation.requests import (
    COMMON_LINE_OPTIONS,
    DTYPE_NAMES,
    SampledRequest,
    SessionOptions,
    dtype_problem,
    guidance_letters,
    read_negative,
    request_of,
    too_small_problems,
)
from library.generation.speed_options import UnetSpeedOptions, attention_option
from library.generation.step_options import UNET_STEP_LINES, UNetStepOptions
from library.training.inference_samplers import SAMPLER_HELP, SAMPLER_NAMES, check_sampler
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import DRAWN, LineOption

SIZE_STEP = 8
LARGEST_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class SdxlModelOptions:
    """Models"""

    ckpt_path: str | None = option(None, help="file or diffusers folder of the SDXL model")
    vae: str | None = option(None, help="file of another VAE than the model's own")
    clip_tokenizer: str | None = option(
        None, help="folder of the CLIP tokenizer, for models with a vocabulary of their own"
    )
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that no network is needed"
    )
    v_parameterization: bool = option(False, help="the model predicts velocity; not needed where the file says so")
    zero_terminal_snr: bool = option(
        False, help="the model was trained with a zero-terminal schedule; not needed where the file says so"
    )
    dtype: str = option(
        "float16", help=f"number format of U-Net and text encoders: {', '.join(DTYPE_NAMES)}; the VAE is float32"
    )
    attn_mode: str = attention_option()
    lora_weights: list[str] | None = option(None, nargs="*", help='adapter files, each as "path" or "path;multiplier"')
    merge_lora_weights: bool = option(False, help="add the adapters to the weights instead of hooking them")

    def __post_init__(self) -> None:
        problem = dtype_problem("dtype", self.dtype)
        if problem is None and self.dtype_name.startswith("float8"):
            problem = f"--dtype is {self.dtype}; 8-bit storage is there for transformers only; use float16"
        if problem:
            raise ConfigError(problem)

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype.lower()]

    @property
    def num_adapters(self) -> int:
        return len(self.lora_weights or ())

    @property
    def adapters(self) -> AdapterChoice:
        return AdapterChoice(
            [parse_adapter_argument(text) for text in self.lora_weights or ()], self.merge_lora_weights
        )


@dataclass(frozen=True, kw_only=True)
class SdxlPromptOptions:
    """Pictures"""

    prompt: str = option("A photo of a cat", help="what the picture shows")
    prompt2: str | None = option(None, help="prompt of the second text encoder; the first prompt when not given")
    negative_prompt: str = option("", help="what it should not show")
    width: int = option(1024, help="width in pixels, rounded down to a multiple of 8", most=LARGEST_PICTURE_SIDE)
    height: int = option(1024, help="height in pixels, rounded down to a multiple of 8", most=LARGEST_PICTURE_SIDE)
    steps: int = option(50, help="steps")
    cfg_scale: float = option(7.0, help="classifier-free guidance; 1 = off, else two forwards per step")
    sampler: str = option("euler", help="how a step is made: " + ", ".join(SAMPLER_NAMES) + SAMPLER_HELP)
    seed: int | None = option(
        None, convert=seed_of, help="number, or any text, that fixes the picture; a drawn one is shown when not given, or with -1", most=LARGEST_SEED
    )
    output_dir: str = option(".", help="folder of the pictures; made when missing")

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("width", SIZE_STEP), ("height", SIZE_STEP), ("steps", 1), ("seed", DRAWN))
        problems += problems_of(lambda: check_sampler(self.sampler, "--sampler"))
        if self.steps > LARGEST_STEPS:
            problems.append(
                f"--steps is {self.steps}; needed: {LARGEST_STEPS} or less, the steps of the training schedule"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def request(self) -> SdxlRequest:
        return request_of(SdxlRequest, self)


GROUPS = (
    PluginOptions, SdxlModelOptions, UnetSpeedOptions, EmbeddingOptions, SdxlPromptOptions, UNetStepOptions,
    GuidanceOptions, PreviewOptions, SessionOptions, ConsoleOptions,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SdxlRequest(SampledRequest):
    """A picture of SDXL. `prompt2`: for the second text encoder, None = `prompt`."""

    prompt2: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return self.prompt, self.prompt if self.prompt2 is None else self.prompt2


def read_steps(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= LARGEST_STEPS:
        raise ValueError(f"a whole number from 1 to {LARGEST_STEPS} is needed")
    return int(text)


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    **GUIDANCE_LINES,
    **UNET_STEP_LINES,
    "s": LineOption("steps", read_steps),
    "p2": LineOption("prompt2", read_negative),
    **guidance_letters(),
}
