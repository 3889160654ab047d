"""What the image script of FLUX.1 is asked: option groups, the request of a picture, letters of prompt lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.core.errors import ConfigError, Problems
from library.core.options import (
    LARGEST_PICTURE_SIDE,
    LARGEST_SEED,
    LARGEST_STEPS,
    LARGEST_TOKENS,
    option,
)
from library.core.plugins import PluginOptions
from library.core.text_seeds import seed_of
from library.generation.adapter_files import AdapterChoice, EmbeddingOptions, parse_adapter_argument
from library.generation.guidance_options import GUIDANCE_LINES, GuidanceOptions
from library.generation.preview_options import PreviewOptions
from library.generation.requests import (
    COMMON_LINE_OPTIONS,
    DTYPE_NAMES,
    PictureRequest,
    SessionOptions,
    dtype_problem,
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
from library.training.sampling_prompts import DRAWN, LineOption, read_not_negative

SIZE_STEP = 16
STEPS_SCHNELL, STEPS_DEV = 4, 50
MODEL_TYPES = ("flux", "chroma")
"""what --model_type chooses: this family or a variant"""


@dataclass(frozen=True, kw_only=True)
class InferenceModelOptions:
    """Models"""

    format_options: ClassVar[tuple[str, ...]] = ("flux_dtype", "dtype")
    """see `speed_options.denoiser_format`"""
    ckpt_path: str | None = option(None, help="file or diffusers folder of the FLUX.1 denoiser")
    model_type: str = option("flux", help="flux, or chroma, a variant with options of its own", choices=MODEL_TYPES)
    clip_l: str | None = option(None, help="file of the CLIP-L text encoder")
    t5xxl: str | None = option(None, help="file of the T5-XXL text encoder")
    ae: str | None = option(None, help="file of the autoencoder (ae.safetensors)")
    clip_l_tokenizer: str | None = option(
        None, help="folder of the CLIP-L tokenizer, for models with a vocabulary of their own"
    )
    t5xxl_tokenizer: str | None = option(None, help="folder or spiece.model file of the T5 tokenizer")
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that no network is needed"
    )
    t5xxl_max_token_length: int | None = option(
        None, help="longest prompt in T5 tokens; 512 for dev, 256 for schnell when not given", most=LARGEST_TOKENS
    )
    apply_t5_attn_mask: bool = option(False, help="keep T5 and the denoiser from attending to padding")
    dtype: str = option("bfloat16", help=f"number format of all parts: {', '.join(DTYPE_NAMES)}")
    clip_l_dtype: str | None = option(None, help="number format of CLIP-L; that of --dtype when not given")
    ae_dtype: str | None = option(None, help="number format of the autoencoder")
    t5xxl_dtype: str | None = option(None, help="number format of T5")
    flux_dtype: str | None = option(None, help="number format of the denoiser; float8_e4m3fn halves its memory")
    fp8_scaled: bool = scaled_weights_option()
    fp8_fast: bool = fast_products_option()
    attn_mode: str = attention_option()
    offload: bool = option(False, help="keep only the part that computes on the GPU, the others in main memory")
    lora_weights: list[str] | None = option(None, nargs="*", help='adapter files, each as "path" or "path;multiplier"')
    merge_lora_weights: bool = option(
        False,
        help="add the adapters to the weights while these are read, instead of hooking them; 8-bit weights are rounded after that, hooks are exact",
    )

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("dtype", "clip_l_dtype", "ae_dtype", "t5xxl_dtype", "flux_dtype"):
            value = getattr(self, name)
            problem = dtype_problem(name, value)
            if problem:
                problems.add(problem)
            elif (
                value is not None
                and name in ("clip_l_dtype", "ae_dtype", "t5xxl_dtype")
                and self.dtype_of(name).startswith("float8")
            ):
                problems.add(f"--{name} is {value}; only the denoiser is stored in 8 bits (--flux_dtype)")
        if self.t5xxl_max_token_length is not None and self.t5xxl_max_token_length < 1:
            problems.add(f"--t5xxl_max_token_length is {self.t5xxl_max_token_length}; needed: 1 or more")
        problems.raise_if_any()

    def dtype_of(self, name: str) -> str:
        """Name in torch of one part's format. `--dtype` of 8 bits means the denoiser; the other parts are bfloat16
        then."""
        value = getattr(self, name)
        if value is not None:
            return DTYPE_NAMES.get(value.lower(), value)
        common = DTYPE_NAMES.get(self.dtype.lower(), self.dtype)
        return "bfloat16" if common.startswith("float8") and name != "flux_dtype" else common

    @property
    def form(self) -> str | None:
        """How the large matrices of the denoiser are stored, one of library.checkpoints.weight_forms.FORMS."""
        return "fp8_scaled" if self.fp8_scaled else None

    @property
    def num_adapters(self) -> int:
        return len(self.lora_weights or ())

    @property
    def adapters(self) -> AdapterChoice:
        return AdapterChoice(
            [parse_adapter_argument(text) for text in self.lora_weights or ()], self.merge_lora_weights
        )


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Pictures"""

    prompt: str = option("A photo of a cat", help="what the picture shows")
    negative_prompt: str | None = option(None, help="what it should not show; needs --cfg_scale")
    width: int = option(1360, help="width in pixels, rounded down to a multiple of 16", most=LARGEST_PICTURE_SIDE)
    height: int = option(768, help="height in pixels, rounded down to a multiple of 16", most=LARGEST_PICTURE_SIDE)
    seed: int | None = option(
        None, convert=seed_of, help="number, or any text, that fixes the picture; a drawn one is shown when not given, or with -1", most=LARGEST_SEED
    )
    steps: int | None = option(
        None, help=f"steps; {STEPS_SCHNELL} for schnell, {STEPS_DEV} for dev when not given", most=LARGEST_STEPS
    )
    guidance: float = option(3.5, least=0, help="embedded guidance (dev)")
    cfg_scale: float = option(
        1.0, help="classifier-free guidance with --negative_prompt; 1 = off, else two forwards per step"
    )
    output_dir: str = option(".", help="folder of the pictures; made when missing")

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("width", SIZE_STEP), ("height", SIZE_STEP), ("steps", 1), ("seed", DRAWN))
        if problems:
            raise ConfigError(problems)

    @property
    def request(self) -> FluxRequest:
        return request_of(FluxRequest, self)


GROUPS = (
    PluginOptions, InferenceModelOptions, SpeedOptions, EmbeddingOptions, PromptOptions, SamplerStepOptions,
    GuidanceOptions, PreviewOptions, SessionOptions, ConsoleOptions,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FluxRequest(PictureRequest):
    """A picture of FLUX.1; `guidance` is the embedded one of dev."""

    guidance: float = 3.5

    @property
    def negative_text(self) -> str | None:
        """Without a negative prompt there is no guidance by one."""
        return None if self.negative_prompt is None else super().negative_text


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    **GUIDANCE_LINES,
    **STEP_LINES,
    **guidance_letters(LineOption("guidance", read_not_negative)),
}
