"""What the video script of FramePack is asked: option groups, letters of prompt lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.components.framepack_sections import WINDOW, parse_one_frame, section_texts
from library.core.errors import ConfigError, Problems
from library.core.options import LARGEST_STEPS, option, refused_option
from library.core.plugins import PluginOptions
from library.generation.adapter_files import MergedModelOptions
from library.generation.framepack_requests import MAG_RATIOS, MagCacheSettings
from library.generation.guidance_options import GUIDANCE_LINES, GuidanceOptions
from library.generation.llama_clip_options import LlamaClipModelOptions
from library.generation.preview_options import PreviewOptions
from library.generation.requests import SessionOptions, too_small_problems
from library.generation.speed_options import SpeedOptions
from library.generation.step_options import SOLVERS, STEP_LINES, StepOptions
from library.generation.video_options import ClipOptions, CompileOptions, StartOptions, VideoAdapterOptions
from library.generation.video_requests import VIDEO_LINES
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import LineOption, Whole, read_not_negative, read_share

MOST_SECTIONS = 1000
LONGEST = 3600
"""seconds of a video"""


@dataclass(frozen=True, kw_only=True)
class FramePackModelOptions(LlamaClipModelOptions):
    """Models"""

    dit: str | None = option(None, help="file or folder of the FramePack denoiser")
    vae: str | None = option(None, help="file of the HunyuanVideo autoencoder (hunyuan_video_vae_bf16.safetensors)")
    image_encoder: str | None = option(None, help="file or folder of the SigLIP image encoder")
    f1: bool = option(False, help="the denoiser is FramePack-F1, which makes sections from the first to the last")
    custom_system_prompt: str | None = option(
        None, help="what LLaMA is told before the prompt, in the place of the request to describe a video"
    )
    blocks_to_swap: int = option(
        0, help="blocks whose weights wait in main memory; a double block counts as one, two single blocks as one"
    )
    latent_window_size: int = option(WINDOW, help="latent frames of a section", least=1, most=MOST_SECTIONS)
    bulk_decode: bool = option(False, help="decode all latents at once, not two sections at a time")
    rope_scaling_factor: float = option(
        0.5, help="distances between rows and between columns, from --rope_scaling_timestep_threshold on"
    )
    rope_scaling_timestep_threshold: int | None = option(
        None, help="time (0 to 1000) from which on these distances are scaled; never when not given", least=0, most=1000
    )

    def __post_init__(self) -> None:
        if problems := self.model_problems():
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class FramePackClipOptions(ClipOptions):
    """Videos"""

    prompt: str | None = option(
        None, help="what the video shows; for single sections as 0:first;;;-1:last, with -1 for the last one and 1-3"
        " for several"
    )  # fmt: skip
    video_seconds: float = option(5.0, help="length at 30 frames per second", least=0, most=LONGEST)
    video_sections: int | None = option(None, help="length in sections, which counts before --video_seconds")
    fps: float = option(30, help="frames per second of the video file", most=1000)
    infer_steps: int | None = option(25, help="steps of each section", most=LARGEST_STEPS)
    embedded_cfg_scale: float = option(10.0, help="guidance that is told to the model", least=0)
    guidance_rescale: float = option(
        0.0, help="share to which the guided prediction keeps the spread of that for the prompt", least=0, most=1
    )
    image_path: str | None = option(
        None, help="picture that the video begins with; for single sections as 0:first.png;;;2:third.png"
    )
    end_image_path: str | None = option(None, help="picture that the video ends with; not with --f1")
    latent_paddings: str | None = option(
        None, help="how many sections the first ones that are made are told to lie behind the first picture, as 3,2,2"
    )
    sample_solver: str = option(
        "unipc", choices=tuple(SOLVERS), help="solver of the steps; unipc is that of the known script, of order three"
    )
    riflex_index: int = refused_option(
        0, help="RifleX: the frequency of time that is slowed down in long clips",
        reason="each section counts its frames from itself, so that none is at a later place than in the training,"
        " however long the clip is",
    )  # fmt: skip

    def __post_init__(self) -> None:
        problems = Problems()
        for problem in [*self.clip_problems(), *too_small_problems(self, ("video_sections", 1))]:
            problems.add(problem)
        if self.latent_paddings is not None and self.paddings is None:
            problems.add(f"--latent_paddings is '{self.latent_paddings}'; needed: numbers with commas, as 3,2,2,1,0")
        for text in (self.prompt, self.image_path):
            problems.attempt(lambda text=text: section_texts(text or ""))
        problems.raise_if_any()

    @property
    def paddings(self) -> tuple[int, ...] | None:
        """--latent_paddings as numbers; None when they are none."""
        parts = [part.strip() for part in (self.latent_paddings or "").split(",") if part.strip()]
        return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else None

    def request_fields(self) -> dict[str, Any]:
        return dict(
            super().request_fields(), embedded_guidance_scale=self.embedded_cfg_scale, image_path=self.image_path,
            end_image_path=self.end_image_path, seconds=self.video_seconds, sections=self.video_sections,
            latent_paddings=self.paddings or (), guidance_rescale=self.guidance_rescale,
            sampler=SOLVERS[self.sample_solver],
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OneFrameOptions:
    """A single frame beside control pictures"""

    one_frame_inference: str | None = option(
        None, help="make one frame; settings with commas: default, no_2x, no_4x, no_post, target_index=n,"
        " control_index=a;b"
    )  # fmt: skip
    control_image_path: list[str] | None = option(None, nargs="*", help="pictures that the frame is made in view of")
    control_image_mask_path: list[str] | None = option(
        None, nargs="*", help="grey pictures that say what of these is seen (white); their own alpha when not given"
    )
    one_frame_auto_resize: bool = option(
        False, help="take the shape of the first control picture, at the area of --video_size"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        controls, masks = len(self.control_image_path or ()), len(self.control_image_mask_path or ())
        if self.one_frame_inference is not None:
            problems.attempt(lambda: parse_one_frame(self.one_frame_inference or "", controls, WINDOW))
        if masks > controls:
            problems.add(f"--control_image_mask_path has {masks} files for {controls} --control_image_path")
        problems.raise_if_any()

    def request_fields(self) -> dict[str, Any]:
        return dict(
            one_frame=self.one_frame_inference, control_image_paths=tuple(self.control_image_path or ()),
            control_mask_paths=tuple(self.control_image_mask_path or ()), takes_shape=self.one_frame_auto_resize,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MagCacheOptions:
    """MagCache: steps without the blocks"""

    magcache_mag_ratios: str | None = option(
        None, help=f"how what the blocks add grows from step to step, with commas; 0 = the {len(MAG_RATIOS)} of the"
        " released model. Given, steps are left out"
    )  # fmt: skip
    magcache_retention_ratio: float = option(0.2, help="share of the first steps that are whole", least=0, most=1)
    magcache_threshold: float = option(0.24, help="error that may add up while steps are left out", least=0)
    magcache_k: int = option(6, help="most steps in a row that are left out", least=0)
    magcache_calibration: bool = option(False, help="leave nothing out, and print the ratios of the video")

    def __post_init__(self) -> None:
        if self.magcache_mag_ratios is not None and self.ratios is None:
            raise ConfigError(
                f"--magcache_mag_ratios is '{self.magcache_mag_ratios}'; needed: 0, or numbers above 0 with commas, as"
                " --magcache_calibration prints them"
            )

    @property
    def ratios(self) -> tuple[float, ...] | None:
        """--magcache_mag_ratios as numbers; None when they are none."""
        try:
            read = tuple(float(part) for part in (self.magcache_mag_ratios or "").split(",") if part.strip())
        except ValueError:
            return None
        if read == (0.0,):
            return MAG_RATIOS
        return read if read and min(read) > 0 else None

    def request_fields(self) -> dict[str, Any]:
        if self.magcache_mag_ratios is None and not self.magcache_calibration:
            return dict(magcache=None)
        return dict(
            magcache=MagCacheSettings(
                ratios=self.ratios or MAG_RATIOS, retention=self.magcache_retention_ratio,
                threshold=self.magcache_threshold, most=self.magcache_k, calibrate=self.magcache_calibration,
            )
        )  # fmt: skip


GROUPS = (
    PluginOptions, FramePackModelOptions, SpeedOptions, CompileOptions, VideoAdapterOptions, MergedModelOptions,
    FramePackClipOptions, StartOptions, StepOptions, OneFrameOptions, MagCacheOptions, GuidanceOptions, PreviewOptions,
    SessionOptions, ConsoleOptions,
)  # fmt: skip


def read_seconds(text: str) -> float:
    seconds = read_not_negative(text)
    if seconds > LONGEST:
        raise ValueError(f"at most {LONGEST} seconds are possible")
    return seconds


_LETTERS = ("w", "h", "s", "d", "n", "m", "l", "c", "fs", "i", "ei", "ci", "cim", "of", "e", "v", "st", "nm", "vn")
LINE_OPTIONS: Mapping[str, LineOption] = {
    **{letter: VIDEO_LINES[letter] for letter in _LETTERS}, **GUIDANCE_LINES, **STEP_LINES,
    "g": VIDEO_LINES["l"],
    "f": LineOption("seconds", read_seconds),
    "vs": LineOption("sections", Whole(1, MOST_SECTIONS, 4)),
    "mcrr": LineOption("magcache_retention", read_share),
    "mct": LineOption("magcache_threshold", read_not_negative),
    "mck": LineOption("magcache_most", Whole(0, LARGEST_STEPS, 6)),
}
