"""What the image script of HunyuanImage 2.1 is asked: option groups, the request of a picture, letters of prompt
lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_SEED, LARGEST_STEPS, equivalent_option, option
from library.core.plugins import PluginOptions
from library.generation.adapter_files import ListedAdapterOptions
from library.generation.requests import (
    COMMON_LINE_OPTIONS,
    DTYPE_NAMES,
    OUTPUT_TYPES,
    PictureRequest,
    SessionOptions,
    dtype_problem,
    guidance_letters,
    too_small_problems,
)
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import DRAWN, LineOption, read_shift

SIZE_STEP = 32
APG_START_TEXT, APG_START = 38, 5
"""steps after which guidance is projected: for prompts with texts to draw, and for others"""
_ATTENTION = "attention is always computed by torch's scaled_dot_product_attention"


@dataclass(frozen=True, kw_only=True)
class HunyuanImageModelOptions:
    """Models"""

    dit: str | None = option(None, help="file of the HunyuanImage 2.1 denoiser")
    vae: str | None = option(None, help="file of the autoencoder (hunyuan_image_2.1_vae_fp16.safetensors)")
    text_encoder: str | None = option(None, help="file or folder of the Qwen2.5-VL-7B text encoder")
    byt5: str | None = option(None, help="file of the ByT5 glyph encoder")
    text_encoder_tokenizer: str | None = option(None, help="folder of the Qwen2.5-VL tokenizer")
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that no network is needed"
    )
    dtype: str = option("bfloat16", help=f"number format of all parts: {', '.join(DTYPE_NAMES)}")
    fp8: bool = option(False, help="keep the matrices of the denoiser in 8 bits, as they are")
    fp8_scaled: bool = option(
        False,
        help="keep the large matrices of the denoiser in 8 bits, each row scaled to the whole range; closer than --fp8",
    )
    text_encoder_cpu: bool = option(False, help="let the text encoders compute on the CPU")
    device: str | None = option(
        None, help="device of the denoiser, e.g. cuda:1; the first GPU when not given, else the CPU"
    )
    attn_mode: str = equivalent_option(
        "torch", help="which package computes the attention",
        choices=("flash", "torch", "sageattn", "xformers", "sdpa"),
        reason=f"--attn_mode: {_ATTENTION}",
    )  # fmt: skip
    vae_chunk_size: int | None = option(None, help="rows that the VAE computes at once: less memory, equal results")
    vae_tiling: bool = option(
        False, help="let the VAE compute pictures larger than 384 pixels in tiles: little memory, close results"
    )
    blocks_to_swap: int = option(
        0, help="blocks whose weights wait in main memory; a double block counts as one, two single blocks as one"
    )

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("vae_chunk_size", 1), ("blocks_to_swap", 0))
        unknown = dtype_problem("dtype", self.dtype)
        if unknown:
            problems.append(unknown)
        elif self.dtype_name.startswith("float8"):
            problems.append(f"--dtype is {self.dtype}; 8 bits are for the denoiser only: --fp8 or --fp8_scaled")
        if problems:
            raise ConfigError(problems)

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype.lower()]


@dataclass(frozen=True, kw_only=True)
class MergedModelOptions:
    """A model with adapters in it"""

    save_merged_model: str | None = option(
        None, help="write the denoiser with the --lora_weight in it to this file and stop; no picture is made"
    )


@dataclass(frozen=True, kw_only=True)
class HunyuanImagePromptOptions:
    """Pictures"""

    prompt: str | None = option(None, help="what the picture shows; texts in quotation marks are drawn")
    negative_prompt: str = option("", help="what it should not show")
    image_size: tuple[int, ...] = option(
        (2048, 2048), nargs=2, metavar="PIXELS", help=f"height and width, rounded down to multiples of {SIZE_STEP}",
        most=LARGEST_PICTURE_SIDE,
    )  # fmt: skip
    infer_steps: int = option(50, help="steps", most=LARGEST_STEPS)
    guidance_scale: float = option(
        3.5, help="guidance away from the negative prompt, plain in the first steps; 1 = off, else both prompts run in"
        " every step. Of distilled models the embedded one",
    )  # fmt: skip
    apg_start_step_ocr: int = option(
        APG_START_TEXT, help="last step of plain guidance where the prompt quotes a text; later it is projected",
        most=LARGEST_STEPS,
    )  # fmt: skip
    apg_start_step_general: int = option(
        APG_START, help="last step of plain guidance for other prompts", most=LARGEST_STEPS
    )
    guidance_rescale: float = option(
        0.0, help="share to which plain guidance keeps the spread of the prediction for the prompt, 0 to 1"
    )
    guidance_rescale_apg: float = option(0.0, help="the same of projected guidance")
    flow_shift: float = option(5.0, help="how far the steps lie towards noise; 1 = evenly spaced")
    seed: int | None = option(
        None, help="number that fixes the picture; a drawn one is shown when not given, or with -1", most=LARGEST_SEED
    )
    save_path: str | None = option(None, help="folder of the pictures; made when missing")
    output_type: str = option(
        "images", choices=OUTPUT_TYPES, help="what is written: pictures, latents (safetensors), or both"
    )
    latent_path: list[str] | None = option(None, nargs="*", help="decode these latents instead of making new ones")

    def __post_init__(self) -> None:
        problems = too_small_problems(
            self, ("infer_steps", 1), ("seed", DRAWN), ("apg_start_step_ocr", 0), ("apg_start_step_general", 0)
        )
        if len(self.image_size) != 2 or min(self.image_size) < SIZE_STEP:
            size = " ".join(map(str, self.image_size))
            problems.append(f"--image_size is {size}; needed: height and width, {SIZE_STEP} or more each")
        if not self.flow_shift > 0:
            problems.append(f"--flow_shift is {self.flow_shift}; needed: a number above 0")
        for name in ("guidance_rescale", "guidance_rescale_apg"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"--{name} is {getattr(self, name)}; needed: a share, 0 to 1")
        if self.latent_path and self.output_type != "images":
            problems.append(
                f"--output_type is {self.output_type} and --latent_path gives latents already; use --output_type images"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def request(self) -> HunyuanImageRequest:
        height, width = self.image_size
        return HunyuanImageRequest(
            prompt=self.prompt or "", negative_prompt=self.negative_prompt, width=width, height=height,
            steps=self.infer_steps, seed=self.seed, cfg_scale=self.guidance_scale, flow_shift=self.flow_shift,
            apg_start_step_ocr=self.apg_start_step_ocr, apg_start_step_general=self.apg_start_step_general,
            guidance_rescale=self.guidance_rescale, guidance_rescale_apg=self.guidance_rescale_apg,
        )  # fmt: skip

    @property
    def output_dir(self) -> str | None:
        return self.save_path


GROUPS = (
    PluginOptions, HunyuanImageModelOptions, ListedAdapterOptions, MergedModelOptions, HunyuanImagePromptOptions,
    SessionOptions, ConsoleOptions,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HunyuanImageRequest(PictureRequest):
    """A picture of HunyuanImage 2.1. `guidance_scale`: embedded guidance of distilled models, that of `cfg_scale` when
    not given; `apg_start_step_*`: the last step of plain guidance, with and without texts in the prompt; the rescales
    pull the spread of a guided prediction back, before and after that step."""

    cfg_scale: float = 3.5
    flow_shift: float = 5.0
    guidance_scale: float | None = None
    apg_start_step_ocr: int = APG_START_TEXT
    apg_start_step_general: int = APG_START
    guidance_rescale: float = 0.0
    guidance_rescale_apg: float = 0.0


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    **guidance_letters(),
    "fs": LineOption("flow_shift", read_shift),
}
