"""What the video script of Wan is asked: the request of a clip, option groups, letters of prompt lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from library.core.errors import ConfigError, Problems
from library.core.options import LARGEST_STEPS, equivalent_option, ignored_option, option
from library.core.plugins import PluginOptions
from library.families.wan_tasks import TASKS
from library.generation.adapter_files import ListedAdapterOptions, MergedModelOptions
from library.generation.guidance_options import GUIDANCE_LINES, GuidanceOptions
from library.generation.nag_options import NAG_LINES, NagOptions
from library.generation.preview_options import PreviewOptions
from library.generation.requests import DTYPE_NAMES, SampledRequest, SessionOptions
from library.generation.speed_options import SpeedOptions
from library.generation.step_options import SOLVERS, STEP_LINES, StepOptions
from library.generation.video_options import (
    LengthOptions,
    LongClipOptions,
    OldCompileOptions,
    StartOptions,
    StepGuidanceOptions,
    VideoAdapterOptions,
    VideoModelOptions,
)
from library.generation.video_requests import VIDEO_LINES, VideoRequest
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import MOST_FRAMES, LineOption


@dataclass(frozen=True, kw_only=True)
class WanRequest(VideoRequest, SampledRequest):
    """A clip of Wan. `cfg_scale_high_noise`: guidance of the expert for much noise, None: `cfg_scale`; `flow_shift`
    None: that of the task."""

    sampler: str = SOLVERS["unipc"]
    cfg_scale_high_noise: float | None = None
    nag_scale: float | None = None
    """None: no guidance inside the attention"""
    nag_tau: float = 3.5
    nag_alpha: float = 0.5
    nag_prompt: str | None = None

    @property
    def further_texts(self) -> dict[str, str]:
        found = super().further_texts
        if self.nag_scale is None:
            return found
        text = self.negative_prompt if self.nag_prompt is None else self.nag_prompt
        return {**found, "attention": text or ""}

    @property
    def negative_text(self) -> str | None:
        return self.negative_prompt or "" if self.is_guided else None

    @property
    def is_guided(self) -> bool:
        return super().is_guided or self.cfg_scale_high_noise not in (None, 1.0)

    def at_scale(self, scale: float | None) -> WanRequest:
        made = super().at_scale(scale)
        return made if scale is None else dataclasses.replace(made, cfg_scale_high_noise=None)


def parse_one_frame(text: str, option: str, controls: int = 0) -> tuple[tuple[int, ...], int]:
    """(places of the control pictures, place of the frame) of a comma list control_index=a;b,target_index=c;
    `default` stands for nothing. Without places there is no control picture, or the one of `controls` at 0.
    ConfigError."""
    found: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = part.partition("=")
        if name != "default":
            found[name.strip()] = value.strip()
    unknown = sorted(found.keys() - {"control_index", "target_index"})
    try:
        places = found.get("control_index", "0" if controls == 1 else "")
        indices = tuple(int(number) for number in places.split(";")) if places else ()
        target = int(found.get("target_index", "1"))
    except ValueError:
        unknown.append(text)
    if unknown:
        raise ConfigError(
            f"{option} is '{text}', of which {', '.join(unknown)} is not understood; needed:"
            " control_index=0;10,target_index=1, say"
        )
    return indices, target


# -- options -----------------------------------------------------------------------------------------------------------

OFFICIAL_FILES = {
    "t5": ("models_t5_umt5-xxl-enc-bf16.pth",),
    "clip": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
    "vae": ("Wan2.1_VAE.pth",),
    "dit": ("low_noise_model/diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors"),
    "dit_high_noise": ("high_noise_model/diffusion_pytorch_model*.safetensors",),
}
"""option -> where its file is in an official folder, the first that is there"""


@dataclass(frozen=True, kw_only=True)
class WanModelOptions(VideoModelOptions):
    """Models"""

    task: str | None = option(
        None, choices=(None, *TASKS), help="what the model does; by its file when not given, which tells all but the"
        " size of a control model and first and last frames from first ones",
    )  # fmt: skip
    ckpt_dir: str | None = option(None, help="folder of an official release; options that are not given name its files")
    dit: str | None = option(None, help="file of the Wan denoiser; of Wan 2.2 the expert for little noise")
    dit_high_noise: str | None = option(None, help="file of the expert of Wan 2.2 for much noise")
    timestep_boundary: float | None = option(
        None, help="noise level, 0 to 1 or in thousandths, down to which that expert predicts; else that of the task"
    )
    offload_inactive_dit: bool = option(False, help="keep the expert that does not compute in main memory")
    lazy_loading: bool = option(False, help="the same: an expert is on the device while it computes")
    vae: str | None = option(None, help="file of the Wan 2.1 autoencoder (Wan2.1_VAE.pth)")
    vae_dtype: str = option("bfloat16", help=f"number format of the autoencoder: {', '.join(DTYPE_NAMES)}")
    vae_cache_cpu: bool = option(
        False, help="keep what the autoencoder remembers between pieces of a clip in main memory"
    )
    t5: str | None = option(None, help="file of the umT5-XXL text encoder (models_t5_umt5-xxl-enc-bf16.pth)")
    t5_tokenizer: str | None = option(None, help="folder or file of the umT5 tokenizer")
    fp8_t5: bool = option(False, help="keep the matrices of the text encoder in 8 bits")
    clip: str | None = option(None, help="file of the CLIP vision encoder, for Wan 2.1 with pictures")
    disable_numpy_memmap: bool = option(False, help="read model files without mapping them into memory")
    force_v2_1_time_embedding: bool = equivalent_option(
        False, help="one time embedding for each sample",
        reason="--force_v2_1_time_embedding: one embedding is made for each distinct time, which is as small",
    )  # fmt: skip

    rope_func: str = equivalent_option(
        "default", choices=("default", "comfy"), help="how tokens are turned by their places",
        reason="--rope_func: tokens are turned one way, which compiles and gives the numbers of both",
    )  # fmt: skip

    not_optimized: ClassVar[Mapping[str, str]] = {
        "fp8_fast": "known tools leave the feed-forward layers of this model out of it; it can be asked for by itself"
    }
    """see `optimized.choose`"""

    def __post_init__(self) -> None:
        problems = self.model_problems()
        if self.timestep_boundary is not None and not 0 < self.timestep_boundary <= 1000:
            problems.append(f"--timestep_boundary is {self.timestep_boundary}; needed: above 0, at most 1000")
        if self.ckpt_dir is not None and not Path(self.ckpt_dir).is_dir():
            problems.append(f"--ckpt_dir is {self.ckpt_dir}, which is no folder")
        if problems:
            raise ConfigError(problems)
        if self.ckpt_dir is not None:
            self._fill_from(Path(self.ckpt_dir))

    def _fill_from(self, folder: Path) -> None:
        for name, patterns in OFFICIAL_FILES.items():
            found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
            if getattr(self, name) is None and found:
                object.__setattr__(self, name, str(found[0]))

    @property
    def offloads(self) -> bool:
        return self.offload_inactive_dit or self.lazy_loading


@dataclass(frozen=True, kw_only=True)
class WanAdapterOptions(VideoAdapterOptions):
    """LoRAs"""

    lora_weight_high_noise: list[str] | None = option(
        None, nargs="*", help="adapter files for the expert for much noise; --lora_weight are for the other one"
    )
    lora_multiplier_high_noise: list[float] | None = option(
        None, nargs="*", help="strength of each of these, or one for all; 1 when not given"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        problems.attempt(super().__post_init__)
        problems.attempt(lambda: self.high_noise)
        if self.lora_weight_high_noise and not self.merge_lora_weights:
            problems.add(
                "--no-merge_lora_weights: adapters that are hooked work in both experts; leave it out, or"
                " --lora_weight_high_noise"
            )
        problems.raise_if_any()

    @property
    def high_noise(self) -> ListedAdapterOptions | None:
        """The files for the expert for much noise. ConfigError."""
        if not self.lora_weight_high_noise and not self.lora_multiplier_high_noise:
            return None
        try:
            return VideoAdapterOptions(
                lora_weight=self.lora_weight_high_noise, lora_multiplier=self.lora_multiplier_high_noise,
                include_patterns=self.include_patterns if self.lora_weight_high_noise else None,
                exclude_patterns=self.exclude_patterns if self.lora_weight_high_noise else None,
            )  # fmt: skip
        except ConfigError as error:
            names = ("lora_weight", "lora_multiplier")
            told = list(error.problems)
            for name in names:
                told = [text.replace(f"--{name} ", f"--{name}_high_noise ") for text in told]
            raise ConfigError([text.replace("--lora_weight;", "--lora_weight_high_noise;") for text in told]) from error


@dataclass(frozen=True, kw_only=True)
class WanClipOptions(LengthOptions):
    """Videos"""

    size_step = 16
    negative_prompt: str | None = option(None, help="what it should not show; the usual one of the task when not given")
    video_length: int | None = option(
        None, help="frames, rounded down to 4 n + 1; 81 when not given, 1 for t2i", least=1, most=MOST_FRAMES
    )
    fps: float = option(16, help="frames per second of the video file", most=1000)
    infer_steps: int | None = option(None, help="steps; those of the task when not given", most=LARGEST_STEPS)
    guidance_scale: float | None = option(
        None, help="guidance away from the negative prompt; that of the task when not given, 1 = off"
    )
    guidance_scale_high_noise: float | None = option(
        None, help="the same of the expert for much noise; --guidance_scale when that is given, else that of the task"
    )
    split_uncond: bool = option(True, help="both forwards of guidance one after the other: less memory")
    sample_solver: str = option("unipc", choices=tuple(SOLVERS), help="solver of the steps")
    image_path: str | None = option(None, help="picture that is the first frame, for tasks that begin with one")
    end_image_path: str | None = option(None, help="picture that is the last frame")
    control_path: str | None = option(None, help="video file or folder of frames that a control model follows")
    trim_tail_frames: int = option(0, help="frames that are cut off at the end", least=0, most=MOST_FRAMES)
    cpu_noise: bool = equivalent_option(
        False, help="draw the noise on the CPU", reason="--cpu_noise: noise is always drawn on the CPU"
    )
    one_frame_inference: str | None = option(
        None, help="make one frame beside control pictures: control_index=a;b,target_index=c"
    )
    control_image_path: list[str] | None = option(None, nargs="*", help="pictures that this frame is made in view of")
    control_image_mask_path: list[str] | None = ignored_option(
        None, nargs="*", help="what of these is seen", reason="control pictures are seen whole, as in the known script"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        for problem in self.clip_problems():
            problems.add(problem)
        if self.one_frame_inference is not None:
            problems.attempt(lambda: parse_one_frame(self.one_frame_inference or "", "--one_frame_inference"))
        problems.raise_if_any()

    def request_fields(self) -> dict[str, Any]:
        return dict(
            super().request_fields(), sampler=SOLVERS[self.sample_solver], image_path=self.image_path,
            end_image_path=self.end_image_path, control_path=self.control_path, one_frame=self.one_frame_inference,
            control_image_paths=tuple(self.control_image_path or ()),
            cfg_scale_high_noise=self.guidance_scale_high_noise,
        )  # fmt: skip


GROUPS = (
    PluginOptions, WanModelOptions, SpeedOptions, OldCompileOptions, WanAdapterOptions, MergedModelOptions,
    WanClipOptions, StartOptions, LongClipOptions, StepGuidanceOptions, StepOptions, GuidanceOptions, NagOptions,
    PreviewOptions, SessionOptions, ConsoleOptions,
)  # fmt: skip

_NO_MASKS = dataclasses.replace(VIDEO_LINES["cim"], ignored="control pictures are seen whole")
_LETTERS = (
    "w", "h", "f", "d", "s", "l", "c", "fs", "i", "ei", "cn", "n", "ci", "of", "m", "v", "st", "nm", "vn", "in",
    "ri",
)  # fmt: skip
LINE_OPTIONS: Mapping[str, LineOption] = {
    **{letter: VIDEO_LINES[letter] for letter in _LETTERS}, **GUIDANCE_LINES, **STEP_LINES, **NAG_LINES,
    "g": VIDEO_LINES["l"], "cim": _NO_MASKS,
}  # fmt: skip
