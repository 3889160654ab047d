"""What the image script of HunyuanImage 2.1 is asked: option groups, the request of a picture, letters of prompt
lines."""

from __future__ import annotations

from dataclasses import dataclass

from library.generation.requests import PictureRequest

APG_START_TEXT, APG_START = 38, 5
"""steps after which guidance is projected: for prompts with texts to draw, and for others"""


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
