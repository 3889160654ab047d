"""What the image script of Lumina-Image 2.0 is asked: option groups, the request of a picture, letters of prompt
lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.core.errors import ConfigError
from library.core.options import (
    LARGEST_PICTURE_SIDE,
    LARGEST_SEED,
    LARGEST_STEPS,
    LARGEST_TOKENS,
    option,
)
from library.core.plugins import PluginOptions
from library.core.text_seeds import seed_of
from library.generation.adapter_files import AdapterChoice, parse_adapter_argument
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
from library.training.sampling_prompts import DRAWN, LineOption, read_not_negative, read_share, read_shift

SIZE_STEP = 8
TOKEN_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class LuminaModelOptions:
    """Models"""

    format_options: ClassVar[tuple[str, ...]] = ("dtype",)
    """see `speed_options.denoiser_format`"""

    pretrained_model_name_or_path: str | None = option(
        None, help="file of the Lumina-Image 2.0 denoiser, alone or with the other parts inside, or a diffusers folder"
    )
    gemma2_path: str | None = option(
        None, help="file or folder of the Gemma-2-2B text encoder; not needed where the model's file holds it"
    )
    ae_path: str | None = option(
        None, help="file of the autoencoder (ae.safetensors); not needed where the model's file holds it"
    )
    gemma2_tokenizer: str | None = option(None, help="folder of the Gemma 2 tokenizer, or its tokenizer.model file")
    tokenizer_cache_dir: str | None = option(
        None, help="folder where tokenizers are kept, so that no network is needed"
    )
    gemma2_max_token_length: int = option(
        TOKEN_LENGTH, help="longest prompt in Gemma tokens, the system prompt included", most=LARGEST_TOKENS
    )
    dtype: str = option("bf16", help=f"number format of the denoiser: {', '.join(DTYPE_NAMES)}")
    gemma2_dtype: str = option("bf16", help="number format of the text encoder")
    ae_dtype: str = option("bf16", help="number format of the autoencoder")
    device: str | None = option(
        None, help="device that computes, e.g. cuda:1; the first GPU when not given, else the CPU"
    )
    fp8_scaled: bool = scaled_weights_option()
    fp8_fast: bool = fast_products_option()
    offload: bool = option(False, help="keep only the part that computes on the GPU, the others in main memory")
    attn_mode: str = attention_option()
    use_flash_attn: bool = option(False, help="another name of --attn_mode flash")
    use_sage_attn: bool = option(False, help="another name of --attn_mode sageattn")
    lora_weights: list[str] | None = option(None, nargs="*", help='adapter files, each as "path" or "path;multiplier"')
    merge_lora_weights: bool = option(
        False, help="add the adapters to the weights while these are read, instead of hooking them; 8-bit weights are"
        " rounded after that, hooks are exact",
    )

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("gemma2_max_token_length", 1))
        for name in ("dtype", "gemma2_dtype", "ae_dtype"):
            problem = dtype_problem(name, getattr(self, name))
            if problem:
                problems.append(problem)
            elif name != "dtype" and self.dtype_of(name).startswith("float8"):
                problems.append(f"--{name} is {getattr(self, name)}; only the denoiser is stored in 8 bits (--dtype)")
        if problems:
            raise ConfigError(problems)

    def dtype_of(self, name: str) -> str:
        """Name in torch of one part's format."""
        return DTYPE_NAMES[getattr(self, name).lower()]

    @property
    def form(self) -> str | None:
        """How the large matrices of the denoiser are stored, one of library.checkpoints.weight_forms.FORMS."""
        return "fp8_scaled" if self.fp8_scaled else None

    @property
    def num_adapters(self) -> int:
        return len(self.lora_weights or ())

    @property
    def adapters(self) -> AdapterChoice:
        files = [parse_adapter_argument(text) for text in self.lora_weights or ()]
        return AdapterChoice(files, self.merge_lora_weights)


@dataclass(frozen=True, kw_only=True)
class LuminaPromptOptions:
    """Pictures"""

    prompt: str = option("A beautiful sunset over the mountains", help="what the picture shows")
    negative_prompt: str = option("", help="what it should not show")
    system_prompt: str = option("", help="text that stands before the prompt, with <Prompt Start> between them")
    add_system_prompt_to_negative_prompt: bool = option(False, help="put the system prompt before negative prompts too")
    image_width: int = option(
        1024, help=f"width in pixels, rounded down to a multiple of {SIZE_STEP}", most=LARGEST_PICTURE_SIDE
    )
    image_height: int = option(
        1024, help=f"height in pixels, rounded down to a multiple of {SIZE_STEP}", most=LARGEST_PICTURE_SIDE
    )
    steps: int = option(36, help="steps", most=LARGEST_STEPS)
    guidance_scale: float = option(3.5, help="classifier-free guidance; 1 = off, else two forwards per step")
    cfg_trunc_ratio: float = option(
        0.25, least=0, most=1,
        help="how far guidance lasts, as the time that runs from 0 (noise) to 1 (picture); later steps are made without"
        " it; 1 = to the end",
    )
    renorm_cfg: float = option(
        1.0, least=0,
        help="how much longer than without guidance a step may be made by it, at most; longer ones are shortened; 0 ="
        " not bounded",
    )
    discrete_flow_shift: float = option(6.0, help="how far the steps lie towards noise; 1 = evenly spaced")
    seed: int | None = option(
        None, convert=seed_of, help="number, or any text, that fixes the picture; a drawn one is shown when not given, or with -1", most=LARGEST_SEED
    )
    output_dir: str = option("outputs", help="folder of the pictures; made when missing")

    def __post_init__(self) -> None:
        least = (("image_width", SIZE_STEP), ("image_height", SIZE_STEP), ("steps", 1), ("seed", DRAWN))
        problems = too_small_problems(self, *least)
        if not self.discrete_flow_shift > 0:
            problems.append(f"--discrete_flow_shift is {self.discrete_flow_shift}; needed: a number above 0")
        if problems:
            raise ConfigError(problems)

    @property
    def request(self) -> LuminaRequest:
        return request_of(LuminaRequest, self, OPTION_NAMES)


GROUPS = (
    PluginOptions, LuminaModelOptions, SpeedOptions, LuminaPromptOptions, SamplerStepOptions, GuidanceOptions,
    PreviewOptions, SessionOptions, ConsoleOptions,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LuminaRequest(PictureRequest):
    """A picture of Lumina-Image 2.0."""

    cfg_trunc_ratio: float = 0.25
    renorm_cfg: float = 1.0
    flow_shift: float = 6.0


OPTION_NAMES: Mapping[str, str] = {
    "width": "image_width", "height": "image_height", "cfg_scale": "guidance_scale",
    "flow_shift": "discrete_flow_shift",
}  # fmt: skip
"""fields of requests -> options of other names"""
LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    **GUIDANCE_LINES,
    **STEP_LINES,
    **guidance_letters(),
    "ctr": LineOption("cfg_trunc_ratio", read_share),
    "rcfg": LineOption("renorm_cfg", read_not_negative),
    "fs": LineOption("flow_shift", read_shift),
}
