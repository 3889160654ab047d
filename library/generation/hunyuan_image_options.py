"""What the image script of HunyuanImage 2.1 is asked: option groups, the request of a picture, letters of prompt
lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_STEPS, option
from library.core.plugins import PluginOptions
from library.generation.adapter_files import ListedAdapterOptions, MergedModelOptions
from library.generation.guidance_options import GUIDANCE_LINES, GuidanceOptions
from library.generation.latent_options import DitOptions, LatentPictureOptions
from library.generation.preview_options import PreviewOptions
from library.generation.requests import (
    COMMON_LINE_OPTIONS,
    PictureRequest,
    SessionOptions,
    guidance_letters,
    too_small_problems,
)
from library.generation.speed_options import SpeedOptions
from library.generation.step_options import STEP_LINES, SamplerStepOptions
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import LineOption, read_shift

SIZE_STEP = 32
APG_START_TEXT, APG_START = 38, 5
"""steps after which guidance is projected: for prompts with texts to draw, and for others"""


@dataclass(frozen=True, kw_only=True)
class HunyuanImageModelOptions(DitOptions):
    """Models"""

    dit: str | None = option(None, help="file of the HunyuanImage 2.1 denoiser")
    vae: str | None = option(None, help="file of the autoencoder (hunyuan_image_2.1_vae_fp16.safetensors)")
    text_encoder: str | None = option(None, help="file or folder of the Qwen2.5-VL-7B text encoder")
    byt5: str | None = option(None, help="file of the ByT5 glyph encoder")
    text_encoder_tokenizer: str | None = option(None, help="folder of the Qwen2.5-VL tokenizer")
    vae_chunk_size: int | None = option(None, help="rows that the VAE computes at once: less memory, equal results")
    vae_tiling: bool = option(
        False, help="let the VAE compute pictures larger than 384 pixels in tiles: little memory, close results"
    )
    blocks_to_swap: int = option(
        0, help="blocks whose weights wait in main memory; a double block counts as one, two single blocks as one"
    )

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("vae_chunk_size", 1), ("blocks_to_swap", 0)) + self.format_problems()
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class HunyuanImagePromptOptions(LatentPictureOptions):
    """Pictures"""

    size_step = SIZE_STEP
    prompt: str | None = option(None, help="what the picture shows; texts in quotation marks are drawn")
    image_size: tuple[int, ...] = option(
        (2048, 2048), nargs=2, metavar="PIXELS", help=f"height and width, rounded down to multiples of {SIZE_STEP}",
        most=LARGEST_PICTURE_SIDE,
    )  # fmt: skip
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

    def __post_init__(self) -> None:
        problems = self.picture_problems()
        problems += too_small_problems(self, ("apg_start_step_ocr", 0), ("apg_start_step_general", 0))
        for name in ("guidance_rescale", "guidance_rescale_apg"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"--{name} is {getattr(self, name)}; needed: a share, 0 to 1")
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


GROUPS = (
    PluginOptions, HunyuanImageModelOptions, SpeedOptions, ListedAdapterOptions, MergedModelOptions,
    HunyuanImagePromptOptions, SamplerStepOptions, GuidanceOptions, PreviewOptions, SessionOptions, ConsoleOptions,
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
    **GUIDANCE_LINES,
    **STEP_LINES,
    **guidance_letters(),
    "fs": LineOption("flow_shift", read_shift),
}
