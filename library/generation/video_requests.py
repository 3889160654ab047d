"""Clips as they are asked for: records without torch, which samples while training and video scripts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.generation.requests import COMMON_LINE_OPTIONS, PictureRequest, guidance_letters
from library.training.sampling_prompts import (
    MOST_FRAMES,
    LineOption,
    Whole,
    read_not_negative,
    read_share,
    read_shift,
    read_text,
)

if TYPE_CHECKING:
    from typing_extensions import Self

VIDEO_OUTPUT_TYPES = ("video", "images", "latent", "both", "latent_images")
"""what is written: the clip, its frames as pictures, its latents; `both` = latents and clip"""
LATENT_OUTPUTS = frozenset({"latent", "both", "latent_images"})
FRAME_OUTPUTS = frozenset({"images", "latent_images"})
CODEC_ENDINGS = {
    "h264": (".mp4", ".mov", ".mkv"), "h265": (".mp4", ".mov", ".mkv"), "prores": (".mkv", ".mov"),
}  # fmt: skip
"""names of --codec -> files that hold it, that in the place of others first"""
PAD_MODES = ("front", "end")
NOISE_MODES = ("traditional", "direct")
MOST_FREQUENCIES = 128
"""more than any model has on its axis of time"""
CFG_SKIP_MODES = ("early", "late", "middle", "early_late", "alternate", "none")
SLG_MODES = ("original", "uncond")


@dataclass(frozen=True, kw_only=True)
class SkipLayers:
    """Skip-layer guidance. In the steps from `start` to `end` (shares of all) a further forward for the negative text
    leaves the blocks `layers` out: "original" leads away from it by `scale` beside the plain guidance, "uncond" takes
    it in the place of the one for the negative text."""

    layers: tuple[int, ...]
    mode: str = "original"
    scale: float = 3.0
    start: float = 0.0
    end: float = 0.3

    def works_at(self, step: int, steps: int) -> bool:
        return int(steps * self.start) <= step < int(steps * self.end)


@dataclass(frozen=True, kw_only=True)
class VideoRequest(PictureRequest):
    """One clip, as asked for. `cfg_scale` leads away from the negative text, `embedded_guidance_scale` is told to
    distilled models. None: the pipeline's own default, or none of it.

    `strength`: the share of the steps that change `video_path`, from which the clip starts.
    """

    fps: float | None = None
    flow_shift: float | None = None
    embedded_guidance_scale: float | None = None
    image_path: str | None = None
    """first frame"""
    end_image_path: str | None = None
    video_path: str | None = None
    """clip to start from: a file, or a folder of frames"""
    strength: float = 0.8
    pad_mode: str = "end"
    """which end of a `video_path` that is too short is repeated"""
    noise_mode: str = "traditional"
    """which steps change a `video_path`: "traditional" the last int(steps * strength), "direct" those from the one on
    whose noise level is nearest to `strength`"""
    v2_extra_noise: float = 0.0
    """of the start's noise once more, on a `video_path`"""
    i2_extra_noise: float = 0.0
    """noise on the latents of `image_path`"""
    disable_embedded_for_cfg: bool = False
    told_guidance: bool = True
    """whether distilled models are told their guidance; with `disable_embedded_for_cfg` not in steps that are guided by
    the negative text"""
    riflex_index: int = 0
    """the temporal frequency, counted from 1, that is slowed down to less than one turn in the clip; 0 = none"""
    control_path: str | None = None
    """clip, or folder of frames, that the frames follow"""
    control_image_paths: tuple[str, ...] = ()
    control_mask_paths: tuple[str, ...] = ()
    one_frame: str | None = None
    """settings of a single frame that is made beside control pictures, as prompts write them"""
    cfg_skip_mode: str = "none"
    cfg_apply_ratio: float | None = None
    skip_layers: SkipLayers | None = None

    def at_scale(self, scale: float | None) -> Self:
        """A schedule says which steps are guided, in the place of `cfg_skip_mode`."""
        return dataclasses.replace(super().at_scale(scale), cfg_skip_mode="none")

    @property
    def made_steps(self) -> int | None:
        if self.video_path is None or self.steps is None or self.noise_mode == "direct":
            return self.steps
        return int(self.steps * self.strength)


def guided_steps(mode: str, ratio: float | None, steps: int) -> list[bool]:
    """[steps] which steps are guided by both texts, int(steps * ratio) of them: all but the first ones ("early"), all
    but the last ones ("late"), all but those in the middle, all but those at both ends ("early_late"), or evenly spread
    ("alternate": the ratio is added up in binary fractions, which decides ties, as in known scripts)."""
    if mode == "none" or ratio is None:
        return [True] * steps
    if mode == "alternate":
        found, total = [], 0.0
        for _ in range(steps):
            total += ratio
            found.append(total >= 1)
            total -= total >= 1
        return found
    count = int(steps * ratio)
    rest = steps - count
    before = {"early": rest, "late": 0, "early_late": rest // 2, "middle": 0}[mode]
    if mode == "middle":
        first = count // 2
        return [not first <= step < first + rest for step in range(steps)]
    return [before <= step < before + count for step in range(steps)]




def read_noise_mode(text: str) -> str:
    if text not in NOISE_MODES:
        raise ValueError(f"{' or '.join(NOISE_MODES)} is needed")
    return text


VIDEO_LINES: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    **guidance_letters(),
    "f": LineOption("frames", Whole(1, MOST_FRAMES, 25)),
    "fs": LineOption("flow_shift", read_shift),
    "i": LineOption("image_path", read_text),
    "ei": LineOption("end_image_path", read_text),
    "v": LineOption("video_path", read_text),
    "st": LineOption("strength", read_share),
    "nm": LineOption("noise_mode", read_noise_mode),
    "vn": LineOption("v2_extra_noise", read_not_negative),
    "in": LineOption("i2_extra_noise", read_not_negative),
    "ri": LineOption("riflex_index", Whole(0, MOST_FREQUENCIES, 4)),
    "cn": LineOption("control_path", read_text),
    "ci": LineOption("control_image_paths", read_text, repeats=True),
    "cim": LineOption("control_mask_paths", read_text, repeats=True),
    "of": LineOption("one_frame", read_text),
    "e": LineOption("embedded_guidance_scale", read_not_negative),
}
"""letters of the lines of video scripts; a family takes those that mean something to it"""
