"""What the video script of HunyuanVideo and SkyReels V1 is asked: option groups, letters of prompt lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.core.errors import ConfigError
from library.core.options import LARGEST_STEPS, equivalent_option, option
from library.core.plugins import PluginOptions
from library.generation.adapter_files import MergedModelOptions
from library.generation.guidance_options import GUIDANCE_LINES, GuidanceOptions
from library.generation.llama_clip_options import LlamaClipModelOptions
from library.generation.preview_options import PreviewOptions
from library.generation.requests import SessionOptions
from library.generation.speed_options import SpeedOptions
from library.generation.step_options import STEP_LINES, SamplerStepOptions
from library.generation.video_options import (
    LengthOptions,
    LongClipOptions,
    OldCompileOptions,
    StartOptions,
    VideoAdapterOptions,
)
from library.generation.video_requests import VIDEO_LINES, VideoRequest
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import MOST_FRAMES, LineOption

MOST_LAYERS = 1000


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoModelOptions(LlamaClipModelOptions):
    """Models"""

    dit: str | None = option(None, help="file of the HunyuanVideo or SkyReels V1 denoiser")
    vae: str | None = option(None, help="file of the HunyuanVideo autoencoder (hunyuan_video_vae_bf16.safetensors)")
    dit_in_channels: int | None = option(
        None, help="input channels that the denoiser must have: 16 from text to video, 32 from image to video; those of"
        " its file when not given"
    )  # fmt: skip
    img_in_txt_in_offloading: bool = option(
        False, help="keep the layers that read latents and text in main memory between the forwards"
    )
    hidden_state_skip_layer: int = option(
        2, least=0, most=MOST_LAYERS, help="layers of LLaMA, counted from the last, that its states do not pass"
    )
    apply_final_norm: bool = option(
        False, help="let these states pass LLaMA's last norm; those of the last layer have passed it in any case"
    )
    reproduce: bool = equivalent_option(
        False, help="draw nothing in the text encoder", reason="--reproduce: encoding a text draws nothing in any case"
    )
    blocks_to_swap: int = option(
        0, help="blocks whose weights wait in main memory; a double block counts as one, two single blocks as one"
    )

    def __post_init__(self) -> None:
        if problems := self.model_problems():
            raise ConfigError(problems)

    @property
    def hidden_layer(self) -> int:
        """Of the language model's states, counted from the last, which is -1."""
        return -1 - self.hidden_state_skip_layer


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoAdapterOptions(VideoAdapterOptions):
    """LoRAs"""

    exclude_single_blocks: bool = option(False, help="leave out the layers of the single blocks")

    @property
    def further_exclude(self) -> tuple[str, ...]:
        return ("single_blocks",) if self.exclude_single_blocks else ()


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoClipOptions(LengthOptions):
    """Videos"""

    prompt_2: str | None = option(
        None, help="what CLIP-L reads in the place of the prompt; LLaMA, and guidance by the negative prompt, do not"
    )
    video_length: int | None = option(129, help="frames, rounded down to 4 n + 1", least=1, most=MOST_FRAMES)
    infer_steps: int | None = option(50, help="steps", most=LARGEST_STEPS)
    flow_shift: float = option(
        7.0, help="how far the steps lie towards noise; 1 = evenly spaced. 17 suits fewer than 20 steps"
    )
    embedded_cfg_scale: float = option(6.0, help="guidance told to distilled models; 1 for SkyReels V1", least=0)
    disable_embedded_for_cfg: bool = option(
        False, help="tell distilled models no embedded guidance in steps that are guided by the negative prompt"
    )
    image_path: str | None = option(
        None, help="picture that is the first frame, for models from image to video (SkyReels)"
    )

    def __post_init__(self) -> None:
        if problems := self.clip_problems():
            raise ConfigError(problems)

    def request_fields(self) -> dict[str, Any]:
        return dict(
            super().request_fields(), embedded_guidance_scale=self.embedded_cfg_scale, image_path=self.image_path,
            disable_embedded_for_cfg=self.disable_embedded_for_cfg, prompt_2=self.prompt_2,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoRequest(VideoRequest):
    """A clip of HunyuanVideo. `prompt_2`: for CLIP-L, None = `prompt`."""

    prompt_2: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """One for each tensor of the tokens where they differ: ids and mask of LLaMA, ids and mask of CLIP-L."""
        return (self.prompt,) if self.prompt_2 is None else (self.prompt,) * 2 + (self.prompt_2,) * 2


GROUPS = (
    PluginOptions, HunyuanVideoModelOptions, SpeedOptions, OldCompileOptions, HunyuanVideoAdapterOptions,
    MergedModelOptions, HunyuanVideoClipOptions, StartOptions, LongClipOptions, SamplerStepOptions, GuidanceOptions,
    PreviewOptions, SessionOptions, ConsoleOptions,
)  # fmt: skip

_LETTERS = ("w", "h", "f", "s", "d", "n", "m", "l", "c", "fs", "i", "v", "st", "nm", "vn", "in", "ri", "e")
LINE_OPTIONS: Mapping[str, LineOption] = {
    **{letter: VIDEO_LINES[letter] for letter in _LETTERS}, **GUIDANCE_LINES, **STEP_LINES,
    "g": VIDEO_LINES["l"],
}
