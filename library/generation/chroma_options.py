"""What the image script is asked for Chroma: option groups, the request of a picture, letters of prompt lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.core.options import LARGEST_STEPS, LARGEST_TOKENS, equivalent_option, ignored_option, option
from library.core.plugins import PluginOptions
from library.generation.flux_options import MODEL_TYPES, STEPS_DEV, InferenceModelOptions, PromptOptions
from library.generation.guidance_options import GUIDANCE_LINES, GuidanceOptions
from library.generation.preview_options import PreviewOptions
from library.generation.requests import (
    COMMON_LINE_OPTIONS,
    PictureRequest,
    SessionOptions,
    guidance_letters,
    request_of,
)
from library.generation.speed_options import SpeedOptions
from library.generation.step_options import STEP_LINES, SamplerStepOptions
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import LineOption, read_number

STEPS = STEPS_DEV
_T5_ALONE = "Chroma reads prompts through T5 alone"
_NOT_EMBEDDED = "Chroma has no embedded guidance; --cfg_scale guides it, in a prompt line --c or --l"


@dataclass(frozen=True, kw_only=True)
class ChromaModelOptions(InferenceModelOptions):
    """Models"""

    ckpt_path: str | None = option(None, help="file or diffusers folder of the Chroma denoiser")
    model_type: str = option("chroma", help="chroma, or flux, whose options differ", choices=MODEL_TYPES)
    clip_l: str | None = ignored_option(None, help="file of the CLIP-L text encoder", reason=_T5_ALONE)
    clip_l_tokenizer: str | None = ignored_option(None, help="folder of the CLIP-L tokenizer", reason=_T5_ALONE)
    clip_l_dtype: str | None = ignored_option(None, help="number format of CLIP-L", reason=_T5_ALONE)
    t5xxl_max_token_length: int | None = option(
        None, help="longest prompt in T5 tokens; 512 when not given", most=LARGEST_TOKENS
    )
    apply_t5_attn_mask: bool = equivalent_option(
        False, help="keep T5 and the denoiser from attending to padding",
        reason="--apply_t5_attn_mask: Chroma never attends to padding, but for the one token with which it was trained",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type != "chroma":
            raise ConfigError(f"--model_type is {self.model_type}; needed for Chroma: chroma, or leave it out")


@dataclass(frozen=True, kw_only=True)
class ChromaPromptOptions(PromptOptions):
    """Pictures"""

    negative_prompt: str | None = option(None, help="what it should not show; an empty text when not given")
    steps: int | None = option(None, help=f"steps; {STEPS} when not given", most=LARGEST_STEPS)
    guidance: float = ignored_option(
        0.0, help="embedded guidance", reason=_NOT_EMBEDDED
    )
    cfg_scale: float = option(
        1.0, help="classifier-free guidance, away from --negative_prompt; 1 = off, else two forwards per step"
    )

    @property
    def request(self) -> ChromaRequest:
        return request_of(ChromaRequest, self)


GROUPS = (
    PluginOptions, ChromaModelOptions, SpeedOptions, ChromaPromptOptions, SamplerStepOptions, GuidanceOptions,
    PreviewOptions, SessionOptions, ConsoleOptions,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChromaRequest(PictureRequest):
    """A picture of Chroma, guided by its negative prompt alone."""


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    **GUIDANCE_LINES,
    **STEP_LINES,
    **guidance_letters(LineOption("guidance", read_number, ignored=_NOT_EMBEDDED)),
}
