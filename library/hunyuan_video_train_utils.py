"""Numerics that only HunyuanVideo has: the forward that training and sampling share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.components.block_calls import DenoiserCall
from library.components.clip_tokens import needed_text, times_of_tokens
from library.core.courses import course
from library.device_utils import to_device, to_like
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from library.hunyuan_video_models import HYVideoDiffusionTransformer


@course
def predict_velocity(
    denoiser: HYVideoDiffusionTransformer,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Mapping[str, Tensor],
    *,
    guidance: float,
    first_frame: Tensor | None = None,
    guidance_factor: float = NUM_TRAIN_TIMESTEPS,
    **inputs: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Velocity (noise - data) [B, C, F, h, w] of noisy latents of this shape.

    `timesteps` [B], [B, F] for a time per frame or [B, L] per token, on the 0..1000 scale, float32. `guidance`: the
    embedded scale, which reaches the model times `guidance_factor` and which models that are not distilled ignore;
    `first_frame` [B, C, 1, h, w]: latents that models from image to video are shown. `conditioning` has the keys of the
    family. With `feature_layer` among `inputs` the result is (velocity, tokens [B, L, D] after that block).
    """
    device, params = noisy_latents.device, denoiser.params
    given = noisy_latents
    if params.shown_channels:
        if first_frame is None:
            raise ValueError("first_frame is None; a model from image to video is shown the latents of a first frame")
        shown = shown_latents(to_like(first_frame, noisy_latents), noisy_latents.shape[2])
        given = torch.cat((noisy_latents, shown), dim=1)
    states, mask = needed_text(conditioning["llm"], conditioning["llm_mask"])
    frames, height, width = (size // step for size, step in zip(given.shape[2:], params.patch_size))
    times = times_of_tokens(timesteps.float(), frames, frames * height * width)
    scales = torch.full((len(given),), guidance * guidance_factor, device=device, dtype=torch.float32)
    text = (to_device(states, device), None if mask is None else to_device(mask, device))
    told = {"guidance": scales if params.guidance_embed else None}
    vector = to_device(conditioning["clipL"], device)
    return (yield DenoiserCall(denoiser, (given, times, *text, vector), {**told, **inputs}))


def shown_latents(first_frame: Tensor, frames: int) -> Tensor:
    """Latents of a first frame [B, C, 1, h, w] with zeros in the place of all others: [B, C, F, h, w]."""
    batch, channels, _, height, width = first_frame.shape
    return torch.cat((first_frame, first_frame.new_zeros(batch, channels, frames - 1, height, width)), dim=2)
