"""What the image script of SD3 is asked: option groups, the request of a picture, letters of prompt lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import ConfigError, Problems
from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_SEED, LARGEST_STEPS, LARGEST_TOKENS, option
from library.core.plugins import PluginOptions
from library.core.text_seeds import seed_of
from library.generation.adapter_files import AdapterChoice, EmbeddingOptions, parse_adapter_argument
from library.generation.guidance_options import GUIDANCE_LINES, GuidanceOptions
from library.generation.preview_options import PreviewOptions
from library.generation.requests import (
    COMMON_LINE_OPTIONS,
    PictureRequest,
    SessionOptions,
    guidance_letters,
    request_of,
    too_small_problems,
)
from library.generation.speed_options import (
    SpeedOptions,
    attention_option,
    fast_products_option,
    scaled_weights_option,
)
from library.generation.step_options import STEP_LINES, SamplerStepOptions
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import DRAWN, LineOption

SIZE_STEP = 8
TOKEN_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class Sd3ModelOptions:
    """Models"""

    ckpt_path: str | None = option(None, help="file or diffusers folder of the SD3 model")
    clip_l: str | None = option(None, help="file of the CLIP-L text encoder; the model's own when not given")
    clip_g: str | None = option(None, help="file of the CLIP-G text encoder; the model's own when not given")
    t5xxl: str | None = option(
        None, help="file of the T5-XXL text encoder; the model's own when not given, and none where it has none"
    )
    vae: str | None = option(None, help="file of the autoencoder; the model's own when not given")
    clip_l_tokenizer: str | None = option(None, help="folder of the CLIP-L tokenizer, for models with their own words")
    clip_g_tokenizer: str | None = option(None, help="folder of the CLIP-G tokenizer; that of CLIP-L when not given")
    t5xxl_tokenizer: str | None = option(None, help="folder or spiece.model file of the T5 tokenizer")
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that no network is needed"
    )
    t5xxl_token_length: int = option(TOKEN_LENGTH, help="longest prompt in T5 tokens", most=LARGEST_TOKENS)
    apply_lg_attn_mask: bool = option(False, help="keep both CLIPs from attending to padding")
    apply_t5_attn_mask: bool = option(False, help="keep T5 from attending to padding")
    enable_scaled_pos_embed: bool = option(
        False, help="positions that count a picture of any size as the trained one; for adapters trained so"
    )
    split_uncond: bool = option(
        False, help="run both prompts of guidance one after the other: less memory, the same picture up to rounding"
    )
    fp16: bool = option(False, help="compute in float16; float32 when neither --fp16 nor --bf16 is given")
    bf16: bool = option(False, help="compute in bfloat16")
    fp8_scaled: bool = scaled_weights_option()
    fp8_fast: bool = fast_products_option()
    attn_mode: str = attention_option()
    offload: bool = option(False, help="keep only the part that computes on the GPU, the others in main memory")
    lora_weights: list[str] | None = option(None, nargs="*", help='adapter files, each as "path" or "path;multiplier"')
    merge_lora_weights: bool = option(
        False, help="add the adapters to the weights while these are read, instead of hooking them"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        if self.fp16 and self.bf16:
            problems.add("--fp16 and --bf16 are both given; the models compute in one format, leave one out")
        if self.t5xxl_token_length < 1:
            problems.add(f"--t5xxl_token_length is {self.t5xxl_token_length}; needed: 1 or more")
        problems.raise_if_any()

    @property
    def dtype_name(self) -> str:
        """Name in torch of the format that the models compute in."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"

    @property
    def form(self) -> str | None:
        """How the large matrices of the denoiser are stored, one of library.checkpoints.weight_forms.FORMS."""
        return "fp8_scaled" if self.fp8_scaled else None

    @property
    def adapters(self) -> AdapterChoice:
        return AdapterChoice(
            [parse_adapter_argument(text) for text in self.lora_weights or ()], self.merge_lora_weights
        )

    @property
    def num_adapters(self) -> int:
        return len(self.lora_weights or ())


@dataclass(frozen=True, kw_only=True)
class Sd3PromptOptions:
    """Pictures"""

    prompt: str = option("A photo of a cat", help="what the picture shows")
    negative_prompt: str = option("", help="what it should not show")
    width: int = option(
        1024, help=f"width in pixels, rounded down to a multiple of {SIZE_STEP}", most=LARGEST_PICTURE_SIDE
    )
    height: int = option(
        1024, help=f"height in pixels, rounded down to a multiple of {SIZE_STEP}", most=LARGEST_PICTURE_SIDE
    )
    seed: int | None = option(1, convert=seed_of, help="number, or any text, that fixes the picture; a drawn one is shown with -1", most=LARGEST_SEED)
    steps: int = option(50, help="steps", most=LARGEST_STEPS)
    cfg_scale: float = option(5.0, help="classifier-free guidance; 1 = off, else two forwards per step")
    output_dir: str = option(".", help="folder of the pictures; made when missing")

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("width", SIZE_STEP), ("height", SIZE_STEP), ("steps", 1), ("seed", DRAWN))
        if problems:
            raise ConfigError(problems)

    @property
    def request(self) -> Sd3Request:
        return request_of(Sd3Request, self)


GROUPS = (
    PluginOptions, Sd3ModelOptions, SpeedOptions, EmbeddingOptions, Sd3PromptOptions, SamplerStepOptions,
    GuidanceOptions, PreviewOptions, SessionOptions, ConsoleOptions,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sd3Request(PictureRequest):
    """A picture of SD3."""


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    **GUIDANCE_LINES,
    **STEP_LINES,
    **guidance_letters(),
}
