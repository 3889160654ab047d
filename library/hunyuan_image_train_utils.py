"""Numerics that only HunyuanImage 2.1 has: the forward that training and sampling share, and its guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.components.block_calls import DenoiserCall
from library.core.courses import course
from library.device_utils import to_device
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS, with_spread

if TYPE_CHECKING:
    from library.hunyuan_image_models import HYImageDiffusionTransformer


@course
def predict_velocity(
    denoiser: HYImageDiffusionTransformer,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Mapping[str, Tensor],
    *,
    guidance: float,
    timesteps_r: Tensor | None = None,
    **inputs: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Velocity (noise - data) [B, C, H, W] of noisy latents [B, C, H, W].

    `timesteps` [B], or [B, H * W] for a time per token, are on the 0..1000 scale, float32, as is `timesteps_r`, the
    earlier time that a mean-flow model steps to (None: the same). `guidance` is the embedded scale, which models that
    are not distilled ignore. `conditioning` has the keys of the family. With `feature_layer` among `inputs` the result
    is (velocity, tokens [B, H * W, D] after that block). """  # fmt: skip
    device = noisy_latents.device
    needed = needed_text(conditioning)
    text = {name: None if tensor is None else to_device(tensor, device) for name, tensor in needed.items()}
    scales = torch.full((len(noisy_latents),), guidance * NUM_TRAIN_TIMESTEPS, device=device, dtype=torch.float32)
    given = (noisy_latents, timesteps.float(), *(text[name] for name in TEXT_INPUTS))
    beside = {"timestep_r": timesteps_r, "guidance": scales if denoiser.params.guidance_embed else None}
    return (yield DenoiserCall(denoiser, given, {**beside, **inputs}))


TEXT_INPUTS = ("vlm_embed", "vlm_mask", "byt5_embed", "byt5_mask")
"""of the conditioning, in the order in which the denoiser takes them"""


def needed_text(conditioning: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The tensors that the denoiser reads. Glyphs that no caption has, and masks that hide nothing, are left out where
    that can be seen without waiting for a device: attention is faster without them."""
    text: dict[str, Tensor | None] = {name: conditioning[name] for name in TEXT_INPUTS}
    masks = (text["vlm_mask"], text["byt5_mask"])
    if any(mask is None or mask.device.type != "cpu" for mask in masks):  # None: they were left out before
        return text
    if not text["byt5_mask"].any():
        text["byt5_embed"] = text["byt5_mask"] = None
    if text["vlm_mask"].all() and (text["byt5_mask"] is None or text["byt5_mask"].all()):
        text["vlm_mask"] = text["byt5_mask"] = None
    return text


# -- guidance ----------------------------------------------------------------------------------------------------------

APG_SCALE, APG_MOMENTUM, APG_NORM = 10.0, -0.5, 10.0


@dataclass
class ProjectedGuidance:
    """Guidance of one picture: plain up to step `start`, counted from 0, then adaptive projected guidance.

    That follows a running difference m = (positive - negative) - m / 2, whose norm is bounded and of which only the
    part orthogonal to the positive prediction is kept; the running difference is kept from the first step on. `rescale`
    and `rescale_projected` pull the spread of a prediction back to that of the positive one, in either phase. Source:
    arXiv 2410.02416.
    """

    scale: float
    start: int
    rescale: float = 0.0
    rescale_projected: float = 0.0
    step: int = 0
    running: Tensor | None = None

    def __call__(self, positive: Tensor, negative: Tensor, plain: Tensor | None = None) -> Tensor:
        """The guided velocity of this step, [B, ...] float32. `plain`: what plain guidance makes of it, where that has
        another form."""
        difference = positive - negative
        self.running = difference if self.running is None else difference + APG_MOMENTUM * self.running
        is_plain, self.step = self.step <= self.start, self.step + 1
        if is_plain:
            made = negative + self.scale * difference if plain is None else plain
            return with_spread(made, positive, self.rescale)
        axes = tuple(range(1, positive.ndim))
        norm = self.running.square().sum(dim=axes, keepdim=True).sqrt()
        bounded = self.running * (APG_NORM / norm.clamp_min(APG_NORM))
        direction = positive / positive.square().sum(dim=axes, keepdim=True).sqrt().clamp_min(1e-12)
        orthogonal = bounded - (bounded * direction).sum(dim=axes, keepdim=True) * direction
        return with_spread(negative + APG_SCALE * orthogonal, positive, self.rescale_projected)
