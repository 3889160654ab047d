"""The forward of Stable Diffusion 1 and 2 that training and sampling share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.components.ldm_coding import guided, sampling_passes

if TYPE_CHECKING:
    from library.sd_models import UNet2DConditionModel


def predict_noise(unet: UNet2DConditionModel, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], **inputs: Any) -> Tensor:
    """Prediction (noise or v) [B, 4, H, W] at timesteps [B] 0..999; `conditioning` has the keys of the family."""
    return unet(noisy_latents, timesteps, conditioning["hidden_state"].to(noisy_latents.device), **inputs)


def guided_predictor(
    unet: UNet2DConditionModel, conditioning: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, cfg_scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (latents [1, 4, H, W], timestep) -> prediction; see `sampling_passes` for how both prompts run."""
    with_cfg = negative is not None and cfg_scale != 1.0
    passes = sampling_passes(conditioning, negative if with_cfg else None)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        made = []
        for states in passes:
            rows = len(states["hidden_state"])
            times = torch.full((rows,), float(timestep), device=latents.device)
            made.append(predict_noise(unet, latents.repeat(rows, 1, 1, 1), times, states).float())
        predicted = torch.cat(made)
        if not with_cfg:
            return predicted
        first, second = predicted.chunk(2)
        return guided(second, first, cfg_scale)

    return predict
